"""What the learner group is started with."""

from __future__ import annotations

from trainer.config.learner import LearnerConfig
from trainer.run.training import backend


def test_collectives_by_where_shards_rest() -> None:
    assert backend(LearnerConfig()) == backend(LearnerConfig(offload=True)) == "gloo"
    assert backend(LearnerConfig(gpus=1)) == "nccl"
    assert backend(LearnerConfig(gpus=1, offload=True)) == "cpu:gloo,cuda:nccl"
