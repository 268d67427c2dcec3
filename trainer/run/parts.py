"""The moving parts of a run: Ray actors, and the learner group (`trainer.run.training`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import ray

from actors.anchor import AnchorFeeder, AnchorSpec
from actors.connect import Target
from actors.encoding import Encoder, SharedFrames, SharedTextEncoder
from actors.evaluator import Evaluator, EvaluatorSpec
from actors.rewards import RunRewards
from actors.rollout import RolloutGenerator, RolloutSpec
from actors.weights.reading import Exported
from actors.weights.store import WeightStore
from actors.weights.transport import FolderTransport, ObjectTransport, Transport, WeightsGone
from diffusion.lora import PREFIX
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from trainer.config.run import RunConfig
from trainer.learn.entry import LoopSpec
from trainer.run.errors import RunFailed, describe, root_cause
from trainer.run.folder import RunFolder
from trainer.run.resources import CPUS
from trainer.run.training import LearnerGroup

START_DEADLINE_S = 600.0
"""For an actor to have its weights: text encoders of 11 GB come from disks of 50 MB/s too. One that fails says so at once."""
STOP_DEADLINE_S = 60.0
GENERATOR_CALLS = 8
"""Calls of a generator that run at a time: its loop, parcels of an evaluation and those that were given up, `stop`."""


Jobs = dict[str, Any]
"""References to results of actors, by the name of what they make: `test-000040-raw`, `samples-before`, `engine-0`."""


@dataclass
class Results:
    """Jobs that are done: what they made, why they failed, and which can never be made (their weights are gone)."""

    made: dict[str, Any] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)


def collect(jobs: Jobs) -> Results:
    """Take what is ready out of `jobs`."""
    results = Results()
    names = {reference: name for name, reference in jobs.items()}
    for reference in ray.wait(list(names), num_returns=len(names), timeout=0)[0] if names else []:
        name = names[reference]
        del jobs[name]
        try:
            results.made[name] = ray.get(reference)
        except Exception as error:
            lost = results.gone if isinstance(root_cause(error), WeightsGone) else results.broken
            lost[name] = describe(error)
    return results


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
        self.transport: Transport = FolderTransport(str(folder.weights)) if config.weights.transport == "folder" else ObjectTransport()
        self.weights: Any = None
        self.evaluator: Any = None
        self.encoders: list[Any] = []
        self.generators: list[Any] = []
        self.feeder: Any = None
        self._running: dict[Any, str] = {}
        self._evaluated: dict[int, set[str]] = {}  # evaluations that are being made of a published version, by step
        self._learners: LearnerGroup | None = None

    def create_actors(self, rewards: RunRewards, learns: bool = True) -> None:
        """Create every actor; their constructors run while the caller goes on. Unless it `learns`, nothing is made of anchor data."""
        config = self.config
        # Methods are safe to run again (named by version, lease or step), so Ray may retry them after a restart.
        forever = {"max_restarts": -1, "max_task_retries": -1}
        self.weights = ray.remote(WeightStore).options(num_cpus=CPUS["weight store"], **forever).remote(self.transport)
        self.weights.release.remote()  # what evaluations of an earlier start waited for
        texts = ray.remote(Encoder).options(num_cpus=CPUS["encoder"], num_gpus=config.encoder.gpus, **forever)
        self.encoders = [texts.remote(config.model, config.encoder) for _ in range(config.encoder.actors)]
        shared, frames = (SharedTextEncoder(self.encoders), SharedFrames(self.encoders)) if self.encoders else (None, None)
        own = config.uses_data and not config.feeds_data
        o, stored = config.objective, config.replay.store_dtype
        made = (config.seed, config.model, config.sampler, config.rollout, config.prompts, config.data)
        rollout = RolloutSpec(*made, self.target, rewards, own, o.on_samples, stored, shared, frames)
        generator = ray.remote(RolloutGenerator).options(num_cpus=CPUS["generator"], num_gpus=config.rollout.gpus, max_concurrency=GENERATOR_CALLS, **forever)
        self.generators = [generator.remote(rollout, self.weights, i) for i in range(config.rollout.generators)]
        held_out = EvaluatorSpec(tuple(self.generators), config.prompts, config.data, config.sampler, config.evaluation, rewards, str(self.folder.path))
        self.evaluator = ray.remote(Evaluator).options(num_cpus=CPUS["evaluator"], max_restarts=3, max_task_retries=3).remote(held_out)
        if config.feeds_data and learns:
            anchor = AnchorSpec(config.seed, config.model, config.sampler, config.data, config.data_rows, self.target, shared)
            self.feeder = ray.remote(AnchorFeeder).options(num_cpus=CPUS["anchor feeder"], max_concurrency=4, **forever).remote(anchor)

    @property
    def _named_generators(self) -> dict[str, Any]:
        return {f"rollout generator {i}": g for i, g in enumerate(self.generators)}

    @property
    def producers(self) -> dict[str, Any]:
        """Actors whose loops fill the buffer; without rollouts generators are there for evaluations alone."""
        named = self._named_generators if self.config.uses_policy else {}
        return named | ({"anchor feeder": self.feeder} if self.feeder is not None else {})

    def start_producers(self) -> None:
        """Wait for the actors, then let the producers run. Raises RunFailed naming the actor."""
        self.await_generators()
        for name, actor in self.producers.items():
            self._await(name, actor)
        self._running = {actor.run.remote(): name for name, actor in self.producers.items()}

    def await_generators(self) -> None:
        """Wait until encoders and generators hold their weights. Raises RunFailed naming the actor."""
        encoders = {f"encoder {i}": actor for i, actor in enumerate(self.encoders)}
        for name, actor in (encoders | self._named_generators).items():
            self._await(name, actor)

    def _await(self, name: str, actor: Any) -> None:
        try:
            ray.get(actor.pid.remote(), timeout=START_DEADLINE_S)
        except Exception as error:
            raise RunFailed(name, f"did not start: {describe(error)}") from error

    def ended_producers(self) -> dict[str, str]:
        """Producers whose loop ended by itself, with the reason (Ray has already restarted what died)."""
        if not self._running:
            return {}
        ended = {}
        for reference in ray.wait(list(self._running), timeout=0)[0]:
            name = self._running.pop(reference)
            try:
                ray.get(reference)
                ended[name] = "stopped by itself"
            except Exception as error:
                ended[name] = describe(error)
        return ended

    def describe_generators(self) -> Jobs:
        """How each generator's engine runs, by the name of its line."""
        return {f"engine-{i}": generator.describe.remote() for i, generator in enumerate(self.generators)}

    def stop_producers(self) -> None:
        """Let producers finish what they hold and wait for them, within a deadline."""
        for actor in self.producers.values():
            actor.stop.remote()
        if self._running:
            ray.wait(list(self._running), num_returns=len(self._running), timeout=STOP_DEADLINE_S)
        self._running = {}

    # -- learner group --------------------------------------------------------------------------------------------

    def start_training(self) -> None:
        """Start the learner group; its ranks wait until the buffer says that training may begin."""
        spec = LoopSpec(self.config, self.target, str(self.folder.path), self.weights, self.transport, tuple(self.encoders))
        self._learners = LearnerGroup(spec, self.folder.checkpoints.name)

    def training_result(self) -> tuple[int | None, str | None]:
        """See `LearnerGroup.result`."""
        return self._learners.result() if self._learners is not None else (None, None)

    # -- evaluation -----------------------------------------------------------------------------------------------

    def evaluate_before(self) -> Jobs:
        """Start the evaluation of the starting policy."""
        return self._evaluate(None, 0, "before", "raw", final=True)

    def evaluate_start(self, step: int) -> Jobs:
        """Start the evaluation of the policy that generators were started with, as one of `step` updates."""
        return self._evaluate(None, step, "after" if step else "before", "raw", final=True)

    def evaluate_during(self, step: int) -> Jobs:
        """Start a small evaluation of version `step`, with its weights or not at all."""
        jobs = self._evaluate(self.weights.view.remote(None, step), step, f"step-{step:06d}", "raw", final=False)
        self._evaluated[step] = set(jobs)
        self._release({})
        return jobs

    def collect(self, jobs: Jobs) -> Results:
        """`collect`; weights that no evaluation needs any more are let go."""
        results = collect(jobs)
        self._release(results.made | results.broken | results.gone)
        return results

    def _release(self, ended: Mapping[str, Any]) -> None:
        for step, names in list(self._evaluated.items()):
            names -= ended.keys()
            if not names:
                del self._evaluated[step]
                self.weights.release.remote(step)

    def evaluate_after(self, step: int) -> Jobs:
        """Start the evaluations of the exported final policy, raw and averaged."""
        jobs = self._evaluate(self._exported(step, ""), step, "after", "raw", final=True)
        if self.config.optimizer.ema > 0:
            jobs |= self._evaluate(self._exported(step, "-ema"), step, None, "ema", final=True)
        return jobs

    def _evaluate(self, weights: Any, step: int, grid: str | None, kind: str, final: bool) -> Jobs:
        """Grid, and evaluations on test prompts (`final`) and dev prompts, of what the run folder does not hold yet."""
        jobs: Jobs = {}
        if grid is not None and (grid == "after" or not (self.folder.path / "samples" / f"{grid}.png").exists()):
            jobs[f"samples-{grid}"] = self.evaluator.grid.remote(weights, grid)
        splits = ["test"] * final + ["dev"] * (kind == "raw" and self.config.evaluation.every > 0)
        for split in splits:
            name = f"{split}-{step:06d}-{kind}"
            if not (self.folder.path / "eval" / f"{name}.json").exists():
                jobs[name] = self.evaluator.evaluate.remote(weights, split, step, kind, split == "test")
        return jobs

    def _exported(self, step: int, suffix: str) -> Exported:
        """What was trained, of an exported policy."""
        folder = self.folder.exports / f"step-{step:06d}{suffix}"
        if self.config.model.lora.rank:
            return Exported(step, str(folder / LORA_WEIGHTS), PREFIX)
        return Exported(step, str(folder / "transformer"))

    def close(self) -> None:
        """End the learner group and kill the actors; safe at any time."""
        if self._learners is not None:
            self._learners.cancel()
        for actor in [*self.generators, self.feeder, self.evaluator, self.weights, *self.encoders]:
            if actor is not None:
                ray.kill(actor)
