"""What the metrics lines of a running run say so far, and the one-line forms of an update and an evaluation.

:class:`Progress` changes only by :meth:`Progress.add`, with the time given by the caller: it draws nothing
and waits for nothing, so the display that shows it stays thin.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from trainer.report.outcome import relative_change
from trainer.report.record import ROLLOUT_STAGES
from trainer.report.wording import count, duration, fixed, general, number, percent, signed

TREND_UPDATES = 10
TOTAL = "reward"
"""Name of the weighted total of several rewards."""
_BARS = "▁▂▃▄▅▆▇█"
_RECENT = 200
_PACE = 20  # updates whose mean duration makes the ETA


@dataclass
class Progress:
    """What the events so far say. Times are readings of the display's clock in seconds. ``rewards`` holds the recent means of
    each trained reward by name, and under ``TOTAL`` those of their weighted sum."""

    total: int
    update: Mapping[str, object] = field(default_factory=dict)
    step: int = 0
    rewards: dict[str, deque[float]] = field(default_factory=dict)
    first_eval: dict[str, Mapping[str, object]] = field(default_factory=dict)
    held_out: Mapping[str, object] = field(default_factory=dict)
    ticks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_PACE + 1))
    warnings: dict[str, int] = field(default_factory=dict)

    def add(self, line: Mapping[str, object], now: float) -> None:
        """Take in one line of a run; kinds other than ``update`` and ``evaluation`` change nothing."""
        if line.get("kind") == "update":
            self._add_update(line, now)
        elif line.get("kind") == "evaluation" and line.get("weights", "raw") == "raw":
            self.first_eval.setdefault(str(line.get("split")), line)
            self.held_out = line
            for text in warnings_of(line):
                self.warnings.setdefault(text, int(number(line.get("step")) or 0))

    def _add_update(self, line: Mapping[str, object], now: float) -> None:
        step = int(number(line.get("step")) or 0)
        if self.ticks and step <= self.ticks[-1][0]:  # a restart repeats steps: its pace starts afresh
            self.ticks.clear()
        self.ticks.append((step, now))
        self.update, self.step, self.total = line, step, max(step, self.total)
        for name, mean in reward_means(line).items():
            self.rewards.setdefault(name, deque(maxlen=_RECENT)).append(mean)
        for text in warnings_of(line):
            self.warnings.setdefault(text, step)

    def seconds_left(self) -> float | None:
        """Time to the last update at the pace of the last 20; None before two updates are known."""
        if len(self.ticks) < 2:
            return None
        (first_step, first), (last_step, last) = self.ticks[0], self.ticks[-1]
        return max(0, self.total - last_step) * (last - first) / (last_step - first_step)

    def trend(self, name: str) -> float | None:
        """Mean of a reward's last 10 updates minus that of the 10 before; None until there are 20."""
        if len(self.rewards[name]) < 2 * TREND_UPDATES:
            return None
        values = list(self.rewards[name])[-2 * TREND_UPDATES :]
        return sum(values[TREND_UPDATES:]) / TREND_UPDATES - sum(values[:TREND_UPDATES]) / TREND_UPDATES

    def held_out_change(self, key: str) -> float | None:
        """Relative change of a held-out quantity since the first evaluation of the same split."""
        first = self.first_eval.get(str(self.held_out.get("split")), {})
        return relative_change(number(first.get(key)), number(self.held_out.get(key)))

    def held_out_gain(self, reward: str) -> float | None:
        """A held-out reward minus that of the first evaluation of the same split."""
        first = self.first_eval.get(str(self.held_out.get("split")), {})
        before, after = (scores_of(line).get(reward) for line in (first, self.held_out))
        return None if before is None or after is None else after - before


def scores_of(line: Mapping[str, object]) -> dict[str, float]:
    """Means of an update or evaluation line by reward."""
    told = line.get("rewards")
    means = {str(name): number(value) for name, value in told.items()} if isinstance(told, Mapping) else {}
    return {name: mean for name, mean in means.items() if mean is not None}


def reward_means(update: Mapping[str, object]) -> dict[str, float]:
    """Means of an update's trained rewards; where they are several, or have no names, the weighted total first."""
    means, total = scores_of(update), number(update.get("reward_mean"))
    return means if total is None or len(means) == 1 else {TOTAL: total, **means}


def warnings_of(line: Mapping[str, object]) -> list[str]:
    """What the learner warns of in an update, or signs of reward hacking in an evaluation."""
    told = line.get("warnings")
    return [str(text) for text in told] if isinstance(told, list) else []


def update_line(progress: Progress, skipped: int = 0) -> str:
    """One update as a compact line for a log; ``skipped`` updates before it had no line of their own."""
    update = progress.update
    parts = [f"update {progress.step}/{progress.total}"]
    parts += [f"{name} {fixed(mean)}" for name, mean in reward_means(update).items()]
    for key, label in (
        ("policy_loss", "policy loss"),
        ("data_loss", "data loss"),
        ("grad_norm", "grad norm"),
    ):
        if number(update.get(key)) is not None:
            parts.append(f"{label} {general(number(update.get(key)))}")
    if number(update.get("staleness_mean")) is not None:
        parts.append(f"staleness {general(number(update.get('staleness_mean')), 2)}")
    seconds = stage_words(update)
    if seconds:
        parts.append(f"seconds {seconds}")
    failed = failed_words(update.get("failed_scores"))
    if failed:
        parts.append(failed)
    groups = update.get("groups")
    dead = number(groups.get("dead")) if isinstance(groups, Mapping) else None
    if dead:
        parts.append(f"dead groups {count(dead)}")
    if progress.seconds_left() is not None:
        parts.append(f"ETA {duration(progress.seconds_left())}")
    return "  ".join(parts) + (f"  (+{skipped} updates not shown)" if skipped else "")


def part_line(line: Mapping[str, object]) -> str:
    """How a generator or the learner computes: precision, device, attention provider and why; empty for other lines."""
    if line.get("kind") not in ("engine", "learner"):
        return ""
    who = line.get("generator", "learner")
    return f"{who}: " + "; ".join(str(line[key]) for key in ("network", "attention") if line.get(key))


def eval_line(line: Mapping[str, object], progress: Progress) -> str:
    """One evaluation as a line for a log, with the changes since the first one of its split."""
    parts = [f"held-out {line.get('split')} at {line.get('step')}, {line.get('weights', 'raw')} weights:"]
    first = progress.first_eval.get(str(line.get("split")), {})
    before = scores_of(first) if first is not line else {}
    for name, mean in scores_of(line).items():
        parts.append(f"{name} {fixed(mean)}" + (f" ({signed(mean - before[name])})" if name in before else ""))
    for key, label in (("diffusion_loss", "diffusion loss"), ("diversity", "diversity")):
        value = number(line.get(key))
        if value is not None:
            change = relative_change(number(first.get(key)), value) if first is not line else None
            parts.append(f"{label} {fixed(value, 4)}" + (f" ({percent(change)})" if change is not None else ""))
    failed = failed_words(line.get("failed"), line.get("first_failure"))
    return "  ".join(parts + [failed] * bool(failed))


def failed_words(failed: object, first: object = None) -> str:
    """`no score of ocr 3 (first: timeout: …)`; empty when nothing failed."""
    if not isinstance(failed, Mapping):
        return ""
    reasons = first if isinstance(first, Mapping) else {}
    found = []
    for name, amount in failed.items():
        reason = reasons.get(str(name).partition(".")[0])
        found.append(f"{name} {count(number(amount))}" + (f" (first: {reason})" if reason else ""))
    return f"no score of {', '.join(found)}" if found else ""


def sparkline(values: list[float], width: int = 30) -> str:
    """The last values as bars between their least and greatest; equal values give a flat low line.

    >>> sparkline([0.0, 0.5, 1.0])
    '▁▅█'
    """
    shown = values[-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[int((value - low) * scale + 0.5)] for value in shown)


def stage_words(update: Mapping[str, object]) -> str:
    """Learner stages, after a bar the rollout stages beside them: ``wait 0.4 train 2.1 | sample 1.9``."""
    seconds = update.get("seconds")
    if not isinstance(seconds, Mapping):
        return ""
    known = {str(stage): number(value) for stage, value in seconds.items()}
    learner = [f"{stage} {general(value, 2)}" for stage, value in known.items() if stage not in ROLLOUT_STAGES]
    rollout = [f"{stage} {general(value, 2)}" for stage, value in known.items() if stage in ROLLOUT_STAGES]
    return " | ".join(" ".join(words) for words in (learner, rollout) if words)
