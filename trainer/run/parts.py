"""The moving parts of a run as Ray actors, and the learner group under Ray Train."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import CheckpointConfig, FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from safetensors.torch import save

from actors.anchor import AnchorFeeder, AnchorSpec
from actors.connect import Target
from actors.evaluator import Evaluator, EvaluatorSpec
from actors.rollout import RolloutGenerator, RolloutSpec
from actors.weights import Weights, WeightStore
from diffusion.checkpoint import WEIGHTS
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.lora import read_adapter
from services.config import fleet_of
from trainer.config.run import RunConfig
from trainer.learn.loop import LoopSpec, train_loop
from trainer.learn.settle import SettleCheckpointed
from trainer.run.cluster import fleet_app
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder

START_DEADLINE_S = 180.0
STOP_DEADLINE_S = 60.0
CHECKPOINTS_KEPT = 2


def fit(trainer: TorchTrainer) -> int:
    """Run the learner group to its end, as a Ray task; returns the step of its last registered checkpoint, 0 without one.

    A task, because it can be cancelled at any time: a thread of the driver would go on calling Ray while Ray is shut down.
    Checkpoints are named `step-000020`.
    """
    outcome = trainer.fit()
    if outcome.error is not None:
        raise outcome.error
    return int(Path(outcome.checkpoint.path).name.removeprefix("step-")) if outcome.checkpoint is not None else 0


class Parts:
    """Actors and learner group of one run; Ray must be up.

    Args:
        config: the run, paths absolute.
        target: its replay buffer.
        folder: its folder.
    """

    def __init__(self, config: RunConfig, target: Target, folder: RunFolder) -> None:
        self.config, self.target, self.folder = config, target, folder
        # handles of Ray actors: their methods grow a `.remote` that type checkers do not see
        self.weights: Any = None
        self.evaluator: Any = None
        self.generators: list[Any] = []
        self.feeder: Any = None
        self._running: dict[Any, str] = {}
        self._fit: Any = None

    def create_actors(self) -> None:
        """Create every actor; their constructors run while the caller goes on."""
        config = self.config
        rewards = (config.reward, fleet_of(config.fleet, [config.reward]), fleet_app(config))
        # Methods are safe to run again (named by version, lease or step), so Ray may retry them after a restart.
        forever = {"max_restarts": -1, "max_task_retries": -1}
        self.weights = ray.remote(WeightStore).options(num_cpus=0.1, **forever).remote(str(self.folder.weights))
        spec = EvaluatorSpec(config.model, config.sampler, config.prompts, config.data, config.evaluation, *rewards, str(self.folder.path), config.seed)
        self.evaluator = ray.remote(Evaluator).options(num_cpus=1, max_restarts=3, max_task_retries=3).remote(spec)
        if config.uses_policy:
            rollout = RolloutSpec(config.seed, config.model, config.sampler, config.rollout, config.prompts, self.target, *rewards)
            generator = ray.remote(RolloutGenerator).options(num_cpus=1, num_gpus=config.rollout.gpus, max_concurrency=4, **forever)
            self.generators = [generator.remote(rollout, self.weights, i) for i in range(config.rollout.generators)]
        if config.uses_data:
            anchor = AnchorSpec(config.seed, config.model, config.sampler, config.data, config.data_rows, self.target)
            self.feeder = ray.remote(AnchorFeeder).options(num_cpus=0.5, max_concurrency=4, **forever).remote(anchor)

    @property
    def producers(self) -> dict[str, Any]:
        named = {f"rollout generator {i}": g for i, g in enumerate(self.generators)}
        return named | ({"anchor feeder": self.feeder} if self.feeder is not None else {})

    def start_producers(self) -> None:
        """Wait for the actors, then let the producers run. Raises RunFailed naming the actor."""
        for name, actor in self.producers.items():
            try:
                ray.get(actor.pid.remote(), timeout=START_DEADLINE_S)
            except Exception as error:
                raise RunFailed(name, f"did not start: {describe(error)}") from error
        self._running = {actor.run.remote(): name for name, actor in self.producers.items()}

    def check_producers(self) -> None:
        """Raise RunFailed if a producer's loop ended by itself (Ray has already restarted what died)."""
        if not self._running:
            return
        for reference in ray.wait(list(self._running), timeout=0)[0]:
            name = self._running.pop(reference)
            try:
                ray.get(reference)
            except Exception as error:
                raise RunFailed(name, describe(error)) from error
            raise RunFailed(name, "stopped by itself")

    def describe_generators(self) -> list[Any]:
        """References to how each generator's engine runs."""
        return [generator.describe.remote() for generator in self.generators]

    def stop_producers(self) -> None:
        """Let producers finish what they hold and wait for them, within a deadline."""
        for actor in self.producers.values():
            actor.stop.remote()
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_DEADLINE_S)
        self._running = {}

    # -- learner group --------------------------------------------------------------------------------------------

    def start_training(self, resume: bool) -> None:
        """Start the learner group; Ray Train itself finds the last registered checkpoint in the run folder."""
        config, learner = self.config, self.config.learner
        gpu = learner.gpus > 0
        resources = {"CPU": 1.0} | ({"GPU": learner.gpus} if gpu else {})
        trainer = TorchTrainer(
            train_loop,
            train_loop_config={"spec": LoopSpec(config, self.target, str(self.folder.path), self.weights)},
            torch_config=TorchConfig(backend="nccl" if gpu else "gloo", timeout_s=int(learner.collective_timeout_s)),
            scaling_config=ScalingConfig(num_workers=learner.ranks, use_gpu=gpu, resources_per_worker=resources),
            run_config=ray.train.RunConfig(
                name=self.folder.checkpoints.name,
                storage_path=str(self.folder.path),
                failure_config=FailureConfig(max_failures=learner.max_failures),
                checkpoint_config=CheckpointConfig(num_to_keep=CHECKPOINTS_KEPT),
                callbacks=[SettleCheckpointed(self.target)],  # type: ignore[list-item]  # UserCallback is what Ray documents
            ),
        )

        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        environment = {"env_vars": {name: value for name, value in os.environ.items() if name.startswith("RAY_TRAIN_")}}
        task = ray.remote(fit).options(num_cpus=0, max_retries=0, scheduling_strategy=here, runtime_env=environment)
        self._fit = task.remote(trainer)

    def training_done(self) -> bool:
        return not ray.wait([self._fit], timeout=0)[1]

    def training_result(self) -> int:
        """Step of the last registered checkpoint, 0 when there is none. Raises RunFailed with the root cause."""
        try:
            step: int = ray.get(self._fit, timeout=STOP_DEADLINE_S)
        except Exception as error:
            raise RunFailed("learner", describe(error)) from error
        return step

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate_before(self) -> list[Any]:
        """Start the evaluation of the starting policy; references to its results."""
        jobs = [self.evaluator.grid.remote(None, "before"), self.evaluator.evaluate.remote(None, "test", 0)]
        if self.config.evaluation.every:
            jobs.append(self.evaluator.evaluate.remote(None, "dev", 0, "raw", False))
        return jobs

    def evaluate_during(self, step: int) -> list[Any]:
        """Start a small evaluation of version `step` on dev prompts."""
        weights = self.weights.get.remote(None, step)
        return [self.evaluator.evaluate.remote(weights, "dev", step, "raw", False), self.evaluator.grid.remote(weights, f"step-{step:06d}")]

    def evaluate_after(self, step: int) -> list[Any]:
        """Start the evaluations of the exported final policy, raw and averaged."""
        raw = ray.put(self._exported(step, ""))
        jobs = [self.evaluator.grid.remote(raw, "after"), self.evaluator.evaluate.remote(raw, "test", step)]
        if self.config.evaluation.every:
            jobs.append(self.evaluator.evaluate.remote(raw, "dev", step, "raw", False))
        if self.config.optimizer.ema > 0:
            jobs.append(self.evaluator.evaluate.remote(ray.put(self._exported(step, "-ema")), "test", step, "ema"))
        return jobs

    def _exported(self, step: int, suffix: str) -> Weights:
        """What was trained, of an exported policy."""
        folder: Path = self.folder.exports / f"step-{step:06d}{suffix}"
        if self.config.model.lora.rank:
            return Weights.of(step, save(read_adapter((folder / LORA_WEIGHTS).read_bytes())))
        return Weights.of(step, (folder / "transformer" / WEIGHTS).read_bytes())

    def split_ready(self, references: list[Any]) -> tuple[list[Any], list[Any]]:
        """References whose results are there, and the others."""
        if not references:
            return [], []
        ready, waiting = ray.wait(references, num_returns=len(references), timeout=0)
        return ready, waiting

    def close(self) -> None:
        """End the learner group and kill the actors; safe at any time."""
        if self._fit is not None:
            ray.cancel(self._fit, force=True)  # Ray Train's controller and the ranks go with their owner
        for actor in [*self.producers.values(), self.evaluator, self.weights]:
            if actor is not None:
                ray.kill(actor)
