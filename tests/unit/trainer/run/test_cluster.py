"""What a run asks of the replay buffer, and the parts of starting up that need no cluster."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest

from replay.errors import ImpossibleSettings
from trainer.config.load import parse_config
from trainer.plan.storage import buffer_settings
from trainer.run.cluster import start_redis
from trainer.run.errors import RunFailed
from trainer.run.folder import RunFolder


def test_a_run_with_rollouts_and_data() -> None:
    config = parse_config({"rollout": {"groups_per_step": 6}, "replay": {"max_staleness": 2, "window": 3, "data_depth": 5}, "checkpoint_every": 7})
    found = buffer_settings(config)
    assert (found.groups_per_step, found.data_per_step, found.max_staleness, found.window, found.data_depth, found.checkpoint_interval) == (6, 1, 2, 3, 5, 7)
    assert found.slots == 18
    found.check()


@pytest.mark.parametrize(("preset", "groups", "data"), [("sft", 0, 1), ("flow_grpo", 8, 0), ("ddrl", 8, 1)])
def test_only_what_the_objective_uses_is_produced(preset: str, groups: int, data: int) -> None:
    found = buffer_settings(parse_config({"objective": {"preset": preset}}))
    assert (found.groups_per_step, found.data_per_step) == (groups, data)


def test_a_window_beyond_the_pipeline_is_found_before_the_start() -> None:
    with pytest.raises(ImpossibleSettings, match="window 17 is larger than the pipeline"):
        buffer_settings(parse_config({"replay": {"window": 17}})).check()


def test_a_redis_where_nothing_listens(tmp_path: Path) -> None:
    config = parse_config({"redis": {"url": "redis://:s3cret@127.0.0.1:9/0", "connect_timeout_s": 0.2}})
    with ExitStack() as stack, pytest.raises(RunFailed, match=r"^Redis: ") as error:
        start_redis(config.redis, RunFolder(tmp_path), 1 << 20, stack)
    assert "s3cret" not in str(error.value)
