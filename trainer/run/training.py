"""The learner group under Ray Train, in a task of its own.

A task, because it can be cancelled at any time: a thread of the driver would go on calling Ray while Ray is shut down. The trainer is
made in that task, so that the driver needs nothing of Ray Train.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from trainer.config.learner import LearnerConfig
from trainer.learn.entry import LoopSpec, train_loop
from trainer.run.errors import describe
from trainer.run.resources import CPUS

CHECKPOINTS_KEPT = 2


def backend(config: LearnerConfig) -> str:
    """The collectives of the ranks: NCCL on GPUs, and gloo beside it for the norm and exports of what rests in host memory."""
    if not config.gpus:
        return "gloo"
    return "cpu:gloo,cuda:nccl" if config.offload else "nccl"


def fit(spec: LoopSpec, checkpoints: str) -> int:
    """Run the learner group to its end; returns the step of its last registered checkpoint, 0 without one.

    Checkpoints are named `step-000020`; Ray Train itself finds the last registered one in the run folder's `checkpoints`.
    """
    import ray.train
    from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from trainer.learn.settle import SettleCheckpointed

    learner = spec.config.learner
    gpu = learner.gpus > 0
    resources = {"CPU": CPUS["rank"]} | ({"GPU": learner.gpus} if gpu else {})
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"spec": spec},
        torch_config=TorchConfig(backend=backend(learner), timeout_s=int(learner.collective_timeout_s)),
        scaling_config=ScalingConfig(num_workers=learner.ranks, use_gpu=gpu, resources_per_worker=resources),
        run_config=ray.train.RunConfig(
            name=checkpoints,
            storage_path=spec.run_dir,
            failure_config=FailureConfig(max_failures=learner.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
            callbacks=[SettleCheckpointed(spec.target)],  # type: ignore[list-item]  # UserCallback is what Ray documents
        ),
    )
    outcome = trainer.fit()
    if outcome.error is not None:
        raise outcome.error
    return int(Path(outcome.checkpoint.path).name.removeprefix("step-")) if outcome.checkpoint is not None else 0


class LearnerGroup:
    """The task that trains; it starts with the constructor.

    Args:
        spec: what every rank is given.
        checkpoints: name of the folder of checkpoints in the run folder.
    """

    def __init__(self, spec: LoopSpec, checkpoints: str) -> None:
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        options: dict[str, Any] = {"num_cpus": 0, "max_retries": 0, "scheduling_strategy": here}
        if spec.config.ray.address is not None:  # a local cluster has the driver's environment; another one costs its own kind of worker
            options["runtime_env"] = {"env_vars": {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}}
        self._fit = ray.remote(fit).options(**options).remote(spec, checkpoints)
        self._returned: tuple[int | None, str | None] | None = None

    def result(self) -> tuple[int | None, str | None]:
        """(step of the last registered checkpoint, None) once the group has returned, (None, why) once it failed."""
        if self._returned is None:
            if not ray.wait([self._fit], timeout=0)[0]:
                return None, None
            try:
                self._returned = ray.get(self._fit), None
            except Exception as error:
                self._returned = None, describe(error)
        return self._returned

    def cancel(self) -> None:
        """End the task; Ray Train's controller and the ranks go with their owner."""
        ray.cancel(self._fit, force=True)
