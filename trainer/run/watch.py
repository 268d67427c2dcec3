"""What the driver does next, as a pure state machine: looks at the run go in, actions come out.

    training ── learner group returned ──► evaluating ── every evaluation is there, or is missing ──► finished
       │  └─ signal, or a sign of hacking ─► stopping ── returned, or the deadline passed ──► interrupted
       └─ refused self-test, a producer or the learner ended, too many dead groups, an evaluation failed ──► failed

Invariants: an end is final. Once training is over no evaluation can make it fail: one that does not come is missing. Update lines
up to the step that a run was resumed at are history and start nothing. The same step seen again (the learner went back to a
checkpoint) asks for later evaluations again.

A worked example, with an evaluation every two updates: `Look(records=[update 1, update 2])` → `[Evaluate(2)]`;
`Look(signals=1)` → `[AskToStop()]`; `Look(trained=2)` → `[End("interrupted", …)]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

EVALUATION_DEADLINE_S = 900.0
"""How long after the last sign of life of the evaluator a run that has been trained waits for it."""


@dataclass(frozen=True)
class Look:
    """What one look at the run found. Times in seconds of one clock.

    Attributes:
        records: new lines of metrics.jsonl.
        evaluated: evaluations that are there since the last look.
        gone: evaluations that cannot be made any more, with the reason.
        broken: evaluations that failed, with the reason.
        ended: producers that ended by themselves, with the reason.
        dead: groups that failed every attempt since this start.
        dead_reason: why the first of them did.
        trained: step of the last registered checkpoint, once the learner group has returned.
        learner_failed: why the learner group failed.
        signals: requests to stop so far.
        registered: step of the last registered checkpoint as of now, 0 without one.
        hacking: signs of reward hacking that the run shall stop for.
    """

    now: float
    records: Sequence[Mapping[str, Any]] = ()
    evaluated: Sequence[str] = ()
    gone: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    ended: Mapping[str, str] = field(default_factory=dict)
    dead: int = 0
    dead_reason: str = ""
    trained: int | None = None
    learner_failed: str | None = None
    signals: int = 0
    registered: int = 0
    hacking: str = ""


@dataclass(frozen=True)
class Evaluate:
    """Evaluate version `step` on dev prompts."""

    step: int


@dataclass(frozen=True)
class EvaluateFinal:
    """Stop the producers, and evaluate the exported policy of `step` on test prompts."""

    step: int


@dataclass(frozen=True)
class AskToStop:
    """Ask the learner group to checkpoint and return after this update; `why`, where no person asked."""

    why: str = ""


@dataclass(frozen=True)
class End:
    """The run is over. `part` failed, or nothing did; `why` is what a person is told. `by_rule`: signs of hacking stopped it."""

    state: Literal["finished", "interrupted", "failed"]
    part: str = ""
    why: str = ""
    by_rule: bool = False


Action = Evaluate | EvaluateFinal | AskToStop | End


class Watch:
    """One run.

    Args:
        updates: updates of the whole run.
        evaluate_every: updates between evaluations; 0 = none.
        max_dead: dead groups that the run survives.
        stop_deadline_s: how long the learner group may take to checkpoint after a signal.
        resumed_at: step of the checkpoint that the run goes on from; 0 from scratch.
    """

    def __init__(self, updates: int, evaluate_every: int, max_dead: int, stop_deadline_s: float, resumed_at: int = 0) -> None:
        self.updates, self.every, self.max_dead = updates, evaluate_every, max_dead
        self.stop_deadline_s, self.resumed_at = stop_deadline_s, resumed_at
        self.phase: Literal["training", "stopping", "evaluating", "ended"] = "training"
        self.step = resumed_at
        self.missing: dict[str, str] = {}
        """Evaluations that will not come, with the reason."""
        self.first_update: float | None = None
        self._pending: set[str] = set()
        self._asked: set[int] = set()
        self._stop_at = math.inf  # a rule is in no hurry, whoever sends a signal is
        self._alive = 0.0
        self._final = 0
        self._rule = ""

    def expect(self, evaluations: Sequence[str], now: float) -> None:
        """These evaluations have been asked for."""
        self._pending |= set(evaluations)
        self._alive = now

    @property
    def pending(self) -> list[str]:
        return sorted(self._pending)

    def look(self, seen: Look) -> list[Action]:
        """Take in one look; what to do now, in this order. Nothing after an End."""
        if self.phase == "ended":
            return []
        actions = self._records(seen)
        self._evaluations(seen)
        end = self._failure(seen) or self._progress(seen, actions)
        if end is not None:
            self.phase = "ended"
            return [*[a for a in actions if isinstance(a, AskToStop)], end]
        return actions

    def _records(self, seen: Look) -> list[Action]:
        actions: list[Action] = []
        for record in seen.records:
            step = int(record.get("step", 0))
            if record.get("kind") != "update" or step <= self.resumed_at:
                continue
            if self.first_update is None:
                self.first_update = seen.now
            self.step = step
            self._asked = {s for s in self._asked if s < step}
            if self.every and step % self.every == 0 and step < self.updates and step not in self._asked and self.phase == "training":
                self._asked.add(step)
                actions.append(Evaluate(step))
        return actions

    def _evaluations(self, seen: Look) -> None:
        if seen.evaluated:
            self._alive = seen.now
        lost = dict(seen.gone)
        if self.phase == "evaluating":
            lost |= seen.broken
            if seen.now > self._alive + EVALUATION_DEADLINE_S:
                lost |= dict.fromkeys(self._pending, f"not there {EVALUATION_DEADLINE_S:.0f} s after the one before it")
        self.missing |= {name: why for name, why in lost.items() if name in self._pending}
        self._pending -= {*seen.evaluated, *lost}

    def _failure(self, seen: Look) -> End | None:
        refused = next((str(r["refused"]) for r in seen.records if r.get("refused")), None)
        if refused is not None:
            return End("failed", "log-probability self-test", refused)
        if seen.learner_failed is not None:
            return End("failed", "learner", seen.learner_failed)
        if self.phase != "training" or seen.trained is not None or seen.signals:
            return None
        for part, why in seen.ended.items():
            return End("failed", part, why)
        for name, why in seen.broken.items():
            return End("failed", "evaluator", f"{name}: {why}")
        if seen.dead > self.max_dead:
            return End("failed", "rollouts", f"{dead_words(seen.dead, seen.dead_reason)}; max_dead_groups={self.max_dead}")
        return None

    def _progress(self, seen: Look, actions: list[Action]) -> End | None:
        if self.phase == "training" and (seen.signals or (seen.hacking and seen.trained is None)):
            self.phase, self._rule = "stopping", "" if seen.signals else seen.hacking
            actions[:] = [AskToStop(self._rule)]
        if self.phase == "stopping" and seen.signals:
            self._stop_at = min(self._stop_at, seen.now)
        if seen.trained is not None and self.phase == "training":
            self.phase, self._final, self._alive = "evaluating", seen.trained, seen.now
            actions.append(EvaluateFinal(seen.trained))
            return None
        if self.phase == "stopping":
            return self._stopped(seen)
        if self.phase == "evaluating":
            if seen.signals:
                return End("interrupted", why=f"stopped during the last evaluation; all {self._final} updates are kept, --resume evaluates")
            if not self._pending and not actions:
                return End("finished")
        return None

    def _stopped(self, seen: Look) -> End | None:
        end = self._after_stop(seen)
        return end if end is None or not self._rule else replace(end, why=f"hacking.stop=stop: {self._rule}; {end.why}", by_rule=True)

    def _after_stop(self, seen: Look) -> End | None:
        goes_on = "the same command with --resume goes on" + (", with --set hacking.stop=warn past further signs" if self._rule else "")
        if seen.trained is not None:
            if seen.trained >= self.updates:
                return End("interrupted", why=f"stopped after the last update, {seen.trained}; --resume evaluates")
            return End("interrupted", why=f"stopped after update {seen.trained} of {self.updates}; its checkpoint is kept, {goes_on}")
        if self.step == self.resumed_at:  # nothing was learnt since this start
            kept = f"the checkpoint of update {self.step} is kept, {goes_on}" if self.step else "the same command starts it anew"
            return End("interrupted", why=f"stopped before the first update was finished; {kept}")
        if seen.now > self._stop_at + self.stop_deadline_s:
            kept = f"the last registered checkpoint is that of update {seen.registered}" if seen.registered else "no checkpoint was registered"
            return End("interrupted", why=f"update {self.step + 1} was not finished within stop_deadline_s={self.stop_deadline_s:g}; {kept}")
        return None


def dead_words(count: int, first_reason: str) -> str:
    """Dead groups in words: `3 groups failed every attempt; the first: scoring: …`"""
    return f"{count} group{'s' if count != 1 else ''} failed every attempt; the first: {first_reason}"
