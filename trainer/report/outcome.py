"""What a run achieved: before/after rows with a verdict, and the comparison of several runs. Pure arithmetic.

The headline is the paired gain of each held-out reward beside the relative rise of the held-out diffusion loss. A
rise above about 10 % goes with visible reward hacking (DDRL notes), so that is where the stop line stands.
Invariant: runs are compared in what is the same of both: the evaluation set and, for a reward, its revision.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from trainer.report.record import RunRecord
from trainer.report.summary import unpaired
from trainer.report.wording import number

STOP_RISE = 0.10
LEAST_PAIRS = 30
"""Paired prompts below which a verdict would be a guess: the normal interval of so few is too narrow."""
VERDICTS = f"Clear: the 95\u202f% interval of the paired change leaves out 0, on at least {LEAST_PAIRS} prompts. Stop line: diffusion loss +10\u202f%."
Tone = Literal["good", "warn", "bad", "none"]
Kind = Literal["reward", "sub-score", "loss", "band", "diversity"]
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Measure:
    """One row: a quantity before and after training.

    ``change`` is a difference, or a ratio minus one where ``relative`` is set; ``stderr`` and ``ci95`` are
    those of the change. ``ema`` is the value after training with the averaged weights. ``trained`` is False for a
    reward that is scored in evaluations only.
    """

    label: str
    kind: Kind
    before: float | None
    after: float | None
    change: float | None
    relative: bool
    digits: int
    stderr: float | None = None
    ci95: tuple[float, float] | None = None
    ema: float | None = None
    ema_change: float | None = None
    verdict: str = ""
    tone: Tone = "none"
    trained: bool = True

    @property
    def title(self) -> str:
        """The label, with what a reader must know of it: ``jpeg (held out)``."""
        return self.label if self.trained else f"{self.label} (held out)"


@dataclass(frozen=True)
class Compared:
    """A run beside the reference: ``gains`` by reward, ``ratio`` is its loss rise over the reference's, None where undefined.
    ``apart_from`` says by reward why its gain is not comparable with the reference's."""

    name: str
    gains: dict[str, Measure]
    rise: float | None
    rise_ci95: tuple[float, float] | None
    ratio: float | None
    apart: bool | None
    note: str
    apart_from: dict[str, str] = field(default_factory=dict)


def measures(summary: Mapping[str, object]) -> list[Measure]:
    """The rows of a summary in reading order: rewards, trained ones first, diffusion loss and its bands, diversity, sub-scores. Values the
    summary lacks are None."""
    return [*reward_measures(summary), _diffusion_loss(summary), *_loss_bands(summary), _diversity(summary), *_entries(summary, "sub_scores", "sub-score")]


def reward_measures(summary: Mapping[str, object]) -> list[Measure]:
    """The rows of the rewards, trained ones first."""
    return sorted(_entries(summary, "rewards", "reward"), key=lambda row: not row.trained)


def provisional_summary(run: RunRecord) -> tuple[dict[str, object], str | None]:
    """First and last held-out evaluation under the summary's keys, and the split used; for unfinished runs.

    Standard errors stay absent: the two evaluations are paired by prompt and the metrics hold only their
    means.
    """
    for split in ("test", "dev"):
        raw, ema = run.points(split, "raw"), run.points(split, "ema")
        if len(raw) < 2:
            continue
        told = {"before": raw[0], "after": raw[-1]} | ({"after_ema": ema[-1]} if ema and ema[-1].step == raw[-1].step else {})
        rewards = {name: {label: point.rewards.get(name) for label, point in told.items()} for name in run.rewards()}
        subs = {name: {label: point.sub_scores.get(name) for label, point in told.items()} for name in raw[-1].sub_scores}
        found: dict[str, object] = {
            "rewards": {name: {**entry, "trained": run.is_trained(name)} for name, entry in rewards.items()},
            "sub_scores": subs,
            "evaluation_set": raw[-1].set_digest,
            "revisions": raw[-1].revisions,
            "prompts": raw[-1].values.get("prompts"),
        }
        for label, point in told.items():
            found |= {f"{key}_{label}": point.values.get(key) for key in ("diffusion_loss", "diversity")}
        return found, split
    return {}, None


def summary_of(run: RunRecord) -> tuple[Mapping[str, object], str]:
    """The summary, or the best the metrics give, with a note on where the rows come from."""
    if run.summary is not None:
        return run.summary, ""
    found, split = provisional_summary(run)
    if split is None:
        return {}, "No summary, and fewer than two held-out evaluations."
    last = run.points(split, "raw")[-1].step
    return found, f"Provisional: first and last evaluation on the {split} prompts, up to update {last}; no intervals."


def compare(runs: Sequence[tuple[str, Mapping[str, object]]]) -> list[Compared]:
    """Reward gains and diffusion-loss rise of each (name, summary); ratios are to the first run's rise."""
    rows: list[Compared] = []
    for name, summary in runs:
        gains = {row.label: row for row in reward_measures(summary)}
        loss = _diffusion_loss(summary)
        if not rows:
            rows.append(Compared(name, gains, loss.change, loss.ci95, None, None, "reference"))
            continue
        reference, first = rows[0], runs[0][1]
        other_set = _differs(first, summary)
        ratio, note = None, ""
        if other_set:
            note = other_set
        elif loss.change is None or reference.rise is None:
            note = "a rise is absent"
        elif reference.rise <= 0:
            note = "no ratio: the reference's loss did not rise"
        else:
            ratio = loss.change / reference.rise
        apart = None if other_set else intervals_apart(loss.ci95, reference.rise_ci95)
        different = {reward: _differs(first, summary, reward) for reward in gains.keys() & reference.gains.keys()}
        different |= {reward: f"not scored in {name if reward in reference.gains else reference.name}" for reward in gains.keys() ^ reference.gains.keys()}
        rows.append(Compared(name, gains, loss.change, loss.ci95, ratio, apart, note, {k: why for k, why in sorted(different.items()) if why}))
    return rows


def shared_reward(rows: Sequence[Compared]) -> str | None:
    """The first trained reward, else the first one, that every run has and that means the same in all; None if there is none."""
    names = [name for name in rows[0].gains if not any(name in row.apart_from or name not in row.gains for row in rows)] if rows else []
    return next((name for name in names if rows[0].gains[name].trained), names[0] if names else None)


def _differs(one: Mapping[str, object], other: Mapping[str, object], reward: str | None = None) -> str:
    """Why two summaries tell of different things; empty if they do not."""
    first, second = ({"set": s.get("evaluation_set"), "revisions": s.get("revisions") or {}} for s in (one, other))
    return unpaired(first, second, reward)


def intervals_apart(one: tuple[float, float] | None, other: tuple[float, float] | None) -> bool | None:
    """Whether two intervals share no point; None if one is absent. (0, 1) and (1, 2) touch: not apart."""
    if one is None or other is None:
        return None
    return one[1] < other[0] or other[1] < one[0]


def relative_change(before: float | None, after: float | None) -> float | None:
    """``after / before - 1``; None without a base that is positive."""
    if before is None or after is None or before <= 0:
        return None
    return after / before - 1


def _pair(value: object) -> tuple[float, float] | None:
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = number(value[0]), number(value[1])
    return None if low is None or high is None else (low, high)


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _entries(summary: Mapping[str, object], section: str, kind: Kind) -> list[Measure]:
    entries = summary.get(section)
    if not isinstance(entries, Mapping):
        return []
    pairs = number(summary.get("prompts"))
    return [_difference_row(str(name), kind, entry, pairs) for name, entry in entries.items() if isinstance(entry, Mapping)]


def _difference_row(name: str, kind: Kind, entry: Mapping[str, object], prompts: float | None) -> Measure:
    before, after, ema = (number(entry.get(key)) for key in ("before", "after", "after_ema"))
    gain, stderr = number(entry.get("gain")), number(entry.get("stderr"))
    change = _difference(before, after) if gain is None else gain
    ci95 = _pair(entry.get("ci95"))
    if ci95 is None and change is not None and stderr is not None:
        ci95 = (change - _NORMAL_95 * stderr, change + _NORMAL_95 * stderr)
    pairs = number(entry.get("pairs"))
    verdict: str = ""
    tone: Tone = "none"
    if kind == "reward":
        verdict, tone = _gain_verdict(change, ci95, prompts if pairs is None else pairs)
    return Measure(
        name, kind, before, after, change, False, 3, stderr, ci95, ema, _difference(before, ema), verdict, tone,
        trained=entry.get("trained") is not False,
    )  # fmt: skip


def _gain_verdict(change: float | None, ci95: tuple[float, float] | None, pairs: float | None) -> tuple[str, Tone]:
    if change is None:
        return "", "none"
    if ci95 is None:
        return "no interval", "none"
    if pairs is not None and pairs < LEAST_PAIRS:
        return "too few prompts to say", "none"
    if ci95[0] > 0:
        return "clear gain", "good"
    if ci95[1] < 0:
        return "clear loss", "bad"
    return "no clear change", "warn"


def _diffusion_loss(summary: Mapping[str, object]) -> Measure:
    before, after = number(summary.get("diffusion_loss_before")), number(summary.get("diffusion_loss_after"))
    ema, ci95 = (
        number(summary.get("diffusion_loss_after_ema")),
        _pair(summary.get("diffusion_loss_rise_ci95")),
    )
    rise = number(summary.get("diffusion_loss_rise"))
    rise = relative_change(before, after) if rise is None else rise
    stderr = number(summary.get("diffusion_loss_rise_stderr"))
    verdict, tone = rise_verdict(rise, ci95)
    return Measure("Diffusion loss", "loss", before, after, rise, True, 4, stderr, ci95, ema,
                   relative_change(before, ema), verdict, tone)  # fmt: skip


def _loss_bands(summary: Mapping[str, object]) -> list[Measure]:
    """The diffusion loss by quarters of the noise levels; none of a summary without them."""
    bands = summary.get("diffusion_loss_bands")
    rows = []
    for name, entry in bands.items() if isinstance(bands, Mapping) else ():
        if isinstance(entry, Mapping):
            before, after, change, stderr = (number(entry.get(key)) for key in ("before", "after", "change", "stderr"))
            label = f"Loss, {str(name).replace('_', ' ')}"
            rows.append(Measure(label, "band", before, after, change, True, 4, stderr, _pair(entry.get("ci95"))))
    return rows


def rise_verdict(rise: float | None, ci95: tuple[float, float] | None = None) -> tuple[str, Tone]:
    """Where a relative rise of the held-out diffusion loss stands against the stop line."""
    if rise is None:
        return "", "none"
    if rise > STOP_RISE:
        return "past the stop line", "bad"
    if ci95 is not None and ci95[1] > STOP_RISE:
        return "interval past the stop line", "warn"
    return "within the stop line", "good"


def _diversity(summary: Mapping[str, object]) -> Measure:
    before, after = number(summary.get("diversity_before")), number(summary.get("diversity_after"))
    ema, change = number(summary.get("diversity_after_ema")), number(summary.get("diversity_change"))
    change = relative_change(before, after) if change is None else change
    return Measure(
        "Diversity",
        "diversity",
        before,
        after,
        change,
        True,
        4,
        number(summary.get("diversity_change_stderr")),
        _pair(summary.get("diversity_change_ci95")),
        ema,
        relative_change(before, ema),
    )
