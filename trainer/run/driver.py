"""The driver: starts every part of a run, looks at it, does what `trainer.run.watch` says, and takes everything down again.

    Redis → Ray → actors → reward fleet → learner group → look, act, look … → summary, report → stop all

It is a thin shell: what to do when stands in the watch. `fit()` runs in a Ray task: Ray Train's SIGINT handler would abort
without a checkpoint. Ours (`trainer.run.signals`) is counted here, and the watch asks the ledger to stop: the ranks agree on it
between two updates, checkpoint and return.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any

from actors.connect import Target
from replay.buffer import ReplayBuffer
from replay.errors import InUse, ReplayError
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.learn.metrics import LedgerMetrics
from trainer.plan.storage import buffer_settings
from trainer.report.display import Display
from trainer.report.summary import evaluation, summarise
from trainer.report.tail import MetricsTail
from trainer.run import cluster
from trainer.run.deaths import Deaths
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder
from trainer.run.hacking import signs
from trainer.run.preflight import check_policy
from trainer.run.resume import registered_step
from trainer.run.scalars import Scalars, Wandb
from trainer.run.signals import Interrupted, StopSignals
from trainer.run.watch import AskToStop, End, Evaluate, EvaluateFinal, Look, Watch, dead_words

if TYPE_CHECKING:
    from trainer.run.parts import Jobs, Parts

logger = logging.getLogger(__name__)

POLL_S = 0.25
STOPPED_BY_RULE = 3
"""Exit status of a run that a sign of reward hacking has stopped (`hacking.stop`)."""
LEDGER_S = 2.0
"""Seconds between two looks at the ledger: for dead groups and Ray's metrics."""


class Driver:
    """One run on one cluster.

    Args:
        config: settings; paths absolute.
        folder: the run folder, opened.
        display: where progress is shown.
        signals: what was asked of the process; installed.
        resume: go on with the folder's run.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, display: Display, signals: StopSignals, resume: bool) -> None:
        self.config, self.folder, self.display, self.signals, self.resume = config, folder, display, signals, resume
        self.wall: dict[str, float] = {}
        self._stack = ExitStack()
        self._past = folder.records()  # told at an earlier start of this run
        self._tail = MetricsTail(folder.metrics)
        self._tail.read()
        self._sinks: list[Scalars | Wandb] = []
        self._parts: Parts
        self._jobs: Jobs = {}
        self._watch = Watch(config.updates, config.evaluation.every, config.max_dead_groups, config.stop_deadline_s, folder.step)

    def run(self) -> dict[str, Any]:
        """Run to the end; returns the summary. Raises ConfigError, RunFailed, Interrupted."""
        started = time.monotonic()
        with self._stack:
            try:
                self._stack.callback(self._report)
                self._open_sinks()
                with self._timed("start"):
                    self._start()
                self._follow()
                self.wall["total"] = time.monotonic() - started
                summary = self._summary()
                self.folder.mark("finished", status=0)
                self.display.stage("Stopping")
            except BaseException as error:
                self._mark(error)
                raise
            finally:
                self.signals.closing()
        return summary

    def _mark(self, error: BaseException) -> None:
        """Say in the folder how the run ended; the report reads it."""
        match error:
            case Interrupted():
                self.folder.mark("interrupted", str(error), error.status)
            case ConfigError():
                self.folder.mark("failed", str(error), 2)
            case _:
                self.folder.mark("failed", str(error) if isinstance(error, RunFailed) else describe(error), 1)

    def _open_sinks(self) -> None:
        config, folder = self.config, self.folder
        with self.signals.held():  # writers have threads
            self._sinks = [self._stack.enter_context(Scalars(folder.path / "tensorboard", folder.step, folder.path / "samples"))]
            if config.wandb_project is not None:
                wandb = Wandb(config.wandb_project, config.name, config.model_dump(mode="json", exclude={"redis"}), folder.path)
                self._sinks.append(self._stack.enter_context(wandb))

    # -- start ------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        config = self.config
        if self.resume:
            self.display.resume(self.folder.step, self._past)
        self.display.stage("Starting Redis and Ray")
        if config.fleet.url is not None:
            self._check_rewards()
        url = cluster.start_redis(config.redis, self.folder, config.replay.max_bytes if config.replay.payloads == "redis" else 0, self._stack)
        target = Target(url, config.name, buffer_settings(config), config.replay.payloads)
        self._buffer = self._open_buffer(target)
        with self.signals.held(), _meanwhile_importing("trainer.run.parts"):
            cluster.start_ray(config.ray, self._stack)
        from trainer.run.parts import Parts
        from trainer.run.rewards import run_rewards

        rewards = run_rewards(config)
        cluster.check_nodes(config, rewards)
        self.display.stage("Starting the actors, the reward fleet and the learner group")
        self._parts = Parts(config, target, self.folder)
        self._stack.callback(self._parts.close)
        self._parts.create_actors(rewards)
        self._parts.start_training()
        check_policy(config)
        cluster.start_fleet(rewards, config.ray.address is not None, self._stack)
        revisions = self._check_rewards()
        self._buffer.expect_rewards({name: revisions[name] for name in rewards.trained_names if config.uses_policy})
        self._deaths = Deaths(self._buffer)
        self._parts.start_producers()
        self._buffer.allow_start()
        self.signals.raising = False

    def _check_rewards(self) -> dict[str, str]:
        """Revisions of the run's rewards, each tried on the run's prompts. Raises ConfigError."""
        from trainer.run.rewards import check_rewards, run_rewards

        return check_rewards(self.config, run_rewards(self.config))

    def _open_buffer(self, target: Target) -> ReplayBuffer:
        try:
            buffer = target.buffer()
            buffer.initialise()
            buffer.clear_stop()
            buffer.allow_start(False)
            counts = buffer.counts()
            if not self.resume and self.folder.leftover and counts.get("epoch", 0) > 0 and counts.get("settled", 0) == 0:
                buffer.forget()  # of the start whose leftovers the folder held
                buffer.initialise()
                counts = buffer.counts()
        except InUse as error:
            raise RunFailed(
                "replay buffer", f"{error}; an earlier start of run '{self.config.name}' may still be going; wait, or choose another name"
            ) from error
        except ReplayError as error:
            raise RunFailed("replay buffer", str(error)) from error
        if not self.resume and counts.get("epoch", 0) > 0:
            raise RunFailed(
                "replay buffer",
                f"Redis already holds a ledger of run '{self.config.name}'; add --resume to go on with it, or choose another name (--set name=…)",
            )
        return buffer

    # -- look and act -----------------------------------------------------------------------------------------

    def _follow(self) -> None:
        """Until the watch says that the run is over. Raises RunFailed, Interrupted."""
        began = looked = time.monotonic()
        metrics = LedgerMetrics(self.config.name)
        self._ask(self._parts.describe_generators() | self._parts.evaluate_before())
        while True:
            now = time.monotonic()
            if now > looked + LEDGER_S:
                looked = now
                metrics.update(self._buffer.counts())
                if self._deaths.look():
                    self.say(f"{dead_words(self._deaths.count, self._deaths.first)}")
            for action in self._watch.look(self._look(now)):
                match action:
                    case Evaluate(step):
                        self._ask(self._parts.evaluate_during(step))
                    case AskToStop(why):
                        self.display.stage(f"Stopping after this update: {why}" if why else "Stopping after this update (again to abort)")
                        # Redis may be slow to answer, and the deadline runs
                        threading.Thread(target=self._buffer.request_stop, daemon=True).start()
                    case EvaluateFinal(step):
                        self._trained(began, step)
                    case End():
                        return self._end(action)
            time.sleep(POLL_S)

    def _look(self, now: float) -> Look:
        results, hacking = self._parts.collect(self._jobs), ""
        for record in results.made.values():
            if isinstance(record, dict):
                told = self._signs(record)
                hacking = hacking or "; ".join(told)
                record |= {"warnings": told} if told else {}
                self.folder.append_evaluation(record)
                self._show(record)
        records = self._tail.read()
        for record in records:
            self._show(record)
        trained, failed = self._parts.training_result()
        return Look(
            now,
            records,
            evaluated=list(results.made),
            gone=results.gone,
            broken=results.broken,
            ended=self._parts.ended_producers(),
            dead=self._deaths.count,
            dead_reason=self._deaths.first,
            trained=trained,
            learner_failed=failed,
            signals=self.signals.count,
            registered=registered_step(self.folder.checkpoints) if self.signals.count or self._watch.phase == "stopping" else 0,
            hacking=hacking if self.config.hacking.stop == "stop" else "",
        )

    def _signs(self, record: dict[str, Any]) -> list[str]:
        """Signs of hacking in an evaluation of the raw weights, against that of the starting policy, each with the grid to look at."""
        if record.get("kind") != "evaluation" or record["weights"] != "raw" or record["step"] == 0:
            return []
        split, step = record["split"], record["step"]
        before, now = (evaluation(self.folder.path, s, split=split) for s in (0, step))
        grid = "after" if split == "test" else f"step-{step:06d}"
        return [f"{sign}; samples/{grid}.png" for sign in (signs(self.config.hacking, before, now) if before and now else ())]

    def _ask(self, jobs: Jobs) -> None:
        self._jobs |= jobs
        self._watch.expect(list(jobs), time.monotonic())

    def _show(self, record: dict[str, Any]) -> None:
        self.display.event(record)
        for sink in self._sinks:
            sink.add(record)

    def say(self, text: str) -> None:
        """One line above the panel, or in the log."""
        self.display.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _trained(self, began: float, step: int) -> None:
        first = self._watch.first_update or began
        self.wall["training"] = time.monotonic() - first
        self.wall["until_first_update"] = first - began
        self._trained_step = step
        with self._timed("stop_rollouts"):
            self._parts.stop_producers()
        self.display.stage("Evaluating on held-out test prompts")
        self._evaluating = time.monotonic()
        self._ask(self._parts.evaluate_after(step))

    def _end(self, end: End) -> None:
        dead = f"; {dead_words(self._deaths.count, self._deaths.first)}" if self._deaths.count and "failed every attempt" not in end.why else ""
        if end.state == "failed":
            raise RunFailed(end.part, end.why + dead)
        if end.state == "interrupted":
            raise Interrupted(end.why + dead, STOPPED_BY_RULE if end.by_rule else self.signals.status)
        self.wall["evaluation_after"] = time.monotonic() - self._evaluating
        for name, why in self._watch.missing.items():
            self.say(f"evaluation {name} is missing: {why}")
        if dead:
            self.say(dead.removeprefix("; "))

    # -- what is left behind ----------------------------------------------------------------------------------

    def _summary(self) -> dict[str, Any]:
        """Write summary.json; returns its content."""
        settled = self._buffer.counts().get("settled", 0)
        records = self.folder.records()
        updates = [r for r in records if r.get("kind") == "update"]
        spent = {stage: sum(float(r["seconds"].get(stage, 0.0)) for r in updates) for stage in ("wait", "train", "publish")}
        summary = summarise(self.config, self.folder.path, self._trained_step, settled, self.wall | spent)
        tests = [r for r in records if r.get("kind") == "self_test"]
        if tests:
            summary["self_test_ratio_deviation"] = tests[-1].get("ratio_deviation_max")
        summary["skipped_updates"] = sum(r["skipped"] > 0 for r in updates)
        summary["missing"] = sorted(self._watch.missing)
        summary["dead_groups"] = {"count": self._deaths.count, "first_reason": self._deaths.first}
        self.folder.summary.write_text(json.dumps(summary, indent=2) + "\n")
        return summary

    def _report(self) -> None:
        """Write the report, also after a failure or Ctrl-C: what there is so far. A report that fails hides no other error."""
        if not self.folder.metrics.exists():
            return
        from trainer.report.page import write_report

        try:
            write_report([self.folder.path], self.folder.path / "report.html")
        except Exception:
            logger.exception("the report could not be written; `ddrl report %s` tries again", self.folder.path)

    @contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.wall[stage] = time.monotonic() - begin


@contextmanager
def _meanwhile_importing(module: str) -> Iterator[None]:
    """Import `module`, which takes seconds, in a thread while the block waits for other processes."""
    thread = threading.Thread(target=import_module, args=(module,))
    thread.start()
    try:
        yield
    finally:
        thread.join()
