"""The driver: starts every part of a run, watches it, evaluates before and after, and takes everything down again.

    folder → Redis → Ray → reward fleet, weight store, evaluator, generators, feeder → learner group (Ray Train)
    → while it trains: show metrics, evaluate, watch for dead groups → evaluate, summary, report → stop all

`fit()` runs in a Ray task: Ray Train's SIGINT handler would abort without a checkpoint. Ours asks the ledger
to stop; the ranks agree on it between two updates, checkpoint and return. A second Ctrl-C aborts.
"""

from __future__ import annotations

import json
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from actors.connect import Target
from diffusion.checkpoint import CheckpointError, load_policy
from replay.buffer import ReplayBuffer
from replay.errors import ReplayError
from trainer.config.run import RunConfig
from trainer.learn.loop import is_evaluated
from trainer.learn.metrics import LedgerMetrics
from trainer.learn.records import append_metrics
from trainer.report.display import Display
from trainer.report.page import write_report
from trainer.report.summary import evaluation, summarise
from trainer.report.tail import MetricsTail
from trainer.run import cluster
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder
from trainer.run.parts import Parts
from trainer.run.rewards import check_rewards, run_rewards
from trainer.run.scalars import Scalars, Wandb

logger = logging.getLogger(__name__)

POLL_S = 0.25
METRICS_S = 5.0
"""Seconds between two looks at the ledger for Ray's metrics."""
EVALUATION_DEADLINE_S = 900.0


class Interrupted(Exception):
    """The run was asked to stop; its last checkpoint is registered and `--resume` goes on from there."""


class Driver:
    """One run on one cluster.

    Args:
        config: settings; paths absolute.
        folder: the run folder, opened.
        display: where progress is shown.
        resume: go on with the folder's run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, display: Display, resume: bool) -> None:
        self.config, self.folder, self.display, self.resume = config, folder, display, resume
        self.wall: dict[str, float] = {}
        self._stack = ExitStack()
        self._tail = MetricsTail(folder.metrics)
        self._buffer: ReplayBuffer | None = None
        self._training = threading.Event()
        self._stopping = False
        self._began = time.time()  # the file may tell of earlier starts of this run

    def run(self) -> dict[str, Any]:
        """Run to the end; returns the summary. Raises RunFailed, Interrupted, KeyboardInterrupt."""
        started = time.monotonic()
        with self._signals(), self._stack:
            self._stack.callback(self._report)
            self._sinks: list[Scalars | Wandb] = [self._stack.enter_context(Scalars(self.folder.path / "tensorboard", samples=self.folder.path / "samples"))]
            if self.config.wandb_project is not None:
                wandb = Wandb(self.config.wandb_project, self.config.name, self.config.model_dump(mode="json", exclude={"redis"}), self.folder.path)
                self._sinks.append(self._stack.enter_context(wandb))
            with self._timed("start"):
                parts = self._start()
            step = self._train(parts)
            with self._timed("stop_rollouts"):
                parts.stop_producers()
            if self._stopping and step < self.config.updates:
                raise Interrupted(f"stopped after update {step} of {self.config.updates}; its checkpoint is kept, the same command with --resume goes on")
            self.display.stage("Evaluating on held-out test prompts")
            with self._timed("evaluation_after"):
                for reference in parts.evaluate_after(step):
                    self._record(reference)
                self._show()
            counts = self._counts()
            self.wall["total"] = time.monotonic() - started
            summary = summarise(self.config, self.folder.path, step, counts.get("settled", 0), self.wall | self._update_seconds())
            tests = [r for r in self.folder.records() if r.get("kind") == "self_test"]
            if tests:
                summary["self_test_ratio_deviation"] = tests[-1].get("ratio_deviation_max")
            summary["skipped_updates"] = sum(int(r["skipped"]) for r in self._updates())
            self.folder.summary.write_text(json.dumps(summary, indent=2) + "\n")
            self.display.stage("Stopping")
        return summary

    # -- start ------------------------------------------------------------------------------------------------

    def _start(self) -> Parts:
        config = self.config
        self.display.stage("Reading the policy")
        try:
            policy = load_policy(config.model, seed=config.seed)
            policy.transformer.tokens((policy.codec.channels, *policy.codec.latent_size(config.sampler.height, config.sampler.width)))
        except (CheckpointError, ValueError) as error:  # ValueError: a size that the policy cannot sample
            raise RunFailed("model", str(error)) from error
        rewards = run_rewards(config)
        if config.fleet.url is not None:
            check_rewards(config, rewards)
        self.display.stage("Starting Redis")
        url = cluster.start_redis(config.redis, self.folder, config.replay.max_bytes if config.replay.payloads == "redis" else 0, self._stack)
        target = Target(url, config.name, cluster.buffer_settings(config), config.replay.payloads)
        try:
            buffer = self._buffer = target.buffer()
            buffer.initialise()
            buffer.clear_stop()
        except ReplayError as error:
            raise RunFailed("replay buffer", str(error)) from error
        if not self.resume and buffer.counts().get("epoch", 0) > 0:
            raise RunFailed(
                "replay buffer", f"Redis already holds a ledger of run '{config.name}'; add --resume to go on with it, or choose another name (--set name=…)"
            )
        self.display.stage("Starting Ray")
        cluster.start_ray(config.ray, self._stack)
        cluster.check_nodes(config)
        self.display.stage("Starting the reward fleet and the actors")
        parts = Parts(config, target, self.folder)
        self._stack.callback(parts.close)
        parts.create_actors()
        self.display.stage("Deploying the reward fleet")
        cluster.start_fleet(rewards, self._stack)
        revisions = check_rewards(config, rewards)
        buffer.expect_rewards({name: revisions[name] for name in rewards.trained_names if config.uses_policy})
        parts.start_producers()
        parts.start_training(self.resume)
        self._training.set()
        self.display.stage("Evaluating the starting policy; starting the learner group")
        return parts

    # -- training ---------------------------------------------------------------------------------------------

    def _train(self, parts: Parts) -> int:
        """Watch until the learner group returns; the step of its last checkpoint."""
        pending = parts.describe_generators() + (parts.evaluate_before() if evaluation(self.folder.path, 0) is None else [])
        asked: set[int] = set()
        first_update: float | None = None
        began = time.monotonic()
        metrics, measured = LedgerMetrics(self.config.name), 0.0
        while not parts.training_done():
            time.sleep(POLL_S)
            for record in self._show():
                if record.get("kind") != "update":
                    continue
                first_update = first_update or time.monotonic()
                step = int(record["step"])
                asked = {s for s in asked if s < step}  # a restarted learner makes later steps, and their evaluations, again
                if is_evaluated(self.config, step) and step not in asked:
                    asked.add(step)
                    pending.extend(parts.evaluate_during(step))
            pending = self._gather(parts, pending)
            parts.check_producers()
            self._check_dead()
            if time.monotonic() > measured + METRICS_S:
                metrics.update(self._counts())
                measured = time.monotonic()
        metrics.update(self._counts())
        self.wall["training"] = time.monotonic() - (first_update or began)
        self.wall["until_first_update"] = (first_update or began) - began
        step = parts.training_result()
        for reference in pending:
            self._record(reference)
        self._show()
        return step

    def _show(self) -> list[dict[str, Any]]:
        """Show what metrics.jsonl has gained; returns it."""
        fresh = self._tail.read()
        for record in fresh:
            self.display.event(record)
            for sink in self._sinks:
                sink.add(record)
        for record in fresh:
            if record.get("refused") and float(record["time"]) >= self._began:
                raise RunFailed("log-probability self-test", record["refused"])
        return fresh

    def _gather(self, parts: Parts, pending: list[Any]) -> list[Any]:
        """Record evaluations that are ready; returns the others."""
        ready, waiting = parts.split_ready(pending)
        for reference in ready:
            self._record(reference)
        return waiting

    def _record(self, reference: Any) -> None:
        """Wait for one evaluation and write it to metrics.jsonl."""
        try:
            result = ray.get(reference, timeout=EVALUATION_DEADLINE_S)
        except Exception as error:
            raise RunFailed("evaluator", describe(error)) from error
        if isinstance(result, dict):
            append_metrics(self.folder.path, result)

    def _check_dead(self) -> None:
        """Give up when groups keep failing: training would only wait for its deadline."""
        assert self._buffer is not None
        letters = self._buffer.dead_letters()
        if len(letters) > self.config.max_dead_groups:
            raise RunFailed("rollouts", f"{len(letters)} groups failed every attempt; the last one: {letters[0].reasons[-1]}")

    def _counts(self) -> dict[str, int]:
        assert self._buffer is not None
        return self._buffer.counts()

    def _report(self) -> None:
        """Write the report, also after a failure or Ctrl-C: what there is so far. A report that fails hides no other error."""
        if not self.folder.metrics.exists():
            return
        try:
            write_report([self.folder.path], self.folder.path / "report.html")
        except Exception:
            logger.exception("the report could not be written; `ddrl report %s` tries again", self.folder.path)

    def _updates(self) -> list[dict[str, Any]]:
        return [r for r in self.folder.records() if r.get("kind") == "update"]

    def _update_seconds(self) -> dict[str, float]:
        """Learner seconds by stage, summed over all updates."""
        return {stage: sum(float(r["seconds"].get(stage, 0.0)) for r in self._updates()) for stage in ("wait", "train", "publish")}

    # -- time and signals ---------------------------------------------------------------------------------------

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.wall[stage] = time.monotonic() - begin

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """First SIGINT or SIGTERM: stop at the next update. Second, or before training: abort at once."""

        def handle(number: int, frame: object) -> None:
            if self._stopping or not self._training.is_set() or self._buffer is None:
                raise KeyboardInterrupt
            self._stopping = True
            # Redis must not be called from a handler that may interrupt a Redis call of this thread
            threading.Thread(target=self._buffer.request_stop, daemon=True).start()
            self.display.stage("Stopping after this update (Ctrl-C again to abort)")

        before = {s: signal.signal(s, handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, previous in before.items():
                signal.signal(s, previous)


def absolute(config: RunConfig) -> RunConfig:
    """Paths of the configuration made absolute: actors and ranks run in other folders."""

    def path(value: str | None) -> str | None:
        return str(Path(value).resolve()) if value else value

    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"path": path(config.model.path)}),
            "prompts": config.prompts.model_copy(update={"path": path(config.prompts.path)}),
            "data": config.data.model_copy(update={"path": path(config.data.path)}),
            "replay": config.replay if config.replay.payloads == "redis" else config.replay.model_copy(update={"payloads": path(config.replay.payloads)}),
        }
    )
