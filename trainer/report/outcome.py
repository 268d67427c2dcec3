"""What a run achieved: before/after rows with a verdict, and the comparison of several runs. Pure arithmetic.

The headline is the paired gain in held-out reward beside the relative rise of the held-out diffusion loss. A
rise above about 10 % goes with visible reward hacking (DDRL notes), so that is where the stop line stands.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from trainer.report.record import RunRecord
from trainer.report.wording import number

STOP_RISE = 0.10
VERDICTS = "Clear: the 95\u202f% interval of the paired change leaves out 0. Stop line: diffusion loss +10\u202f%."
Tone = Literal["good", "warn", "bad", "none"]
_NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Measure:
    """One row: a quantity before and after training.

    ``change`` is a difference, or a ratio minus one where ``relative`` is set; ``stderr`` and ``ci95`` are
    those of the change. ``ema`` is the value after training with the averaged weights.
    """

    label: str
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


@dataclass(frozen=True)
class Compared:
    """A run beside the reference: ``ratio`` is its loss rise over the reference's, None where undefined."""

    name: str
    gain: float | None
    gain_ci95: tuple[float, float] | None
    rise: float | None
    rise_ci95: tuple[float, float] | None
    ratio: float | None
    apart: bool | None
    note: str


def measures(summary: Mapping[str, object]) -> list[Measure]:
    """The four rows of a summary, in reading order. Values the summary lacks are None."""
    return [_reward(summary), _exact_match(summary), _diffusion_loss(summary), _diversity(summary)]


def provisional_summary(run: RunRecord) -> tuple[dict[str, object], str | None]:
    """First and last held-out evaluation under the summary's keys, and the split used; for unfinished runs.

    Standard errors stay absent: the two evaluations are paired by prompt and the metrics hold only their
    means.
    """
    for split in ("test", "dev"):
        raw, ema = run.points(split, "raw"), run.points(split, "ema")
        if len(raw) < 2:
            continue
        found: dict[str, object] = {}
        names = {"reward": "ocr", "exact_match": "exact_match", "diffusion_loss": "diffusion_loss",
                 "diversity": "diversity"}  # fmt: skip
        for key, name in names.items():
            found[f"{name}_before"] = raw[0].values.get(key)
            found[f"{name}_after"] = raw[-1].values.get(key)
            if ema and ema[-1].step == raw[-1].step:
                found[f"{name}_after_ema"] = ema[-1].values.get(key)
        return found, split
    return {}, None


def compare(runs: Sequence[tuple[str, Mapping[str, object]]]) -> list[Compared]:
    """Reward gain and diffusion-loss rise of each (name, summary); ratios are to the first run's rise."""
    rows: list[Compared] = []
    for name, summary in runs:
        reward, loss = _reward(summary), _diffusion_loss(summary)
        ratio, apart, note = None, None, ""
        if not rows:
            note = "reference"
        else:
            reference = rows[0]
            if loss.change is None or reference.rise is None:
                note = "a rise is absent"
            elif reference.rise <= 0:
                note = "no ratio: the reference's loss did not rise"
            else:
                ratio = loss.change / reference.rise
            apart = intervals_apart(loss.ci95, reference.rise_ci95)
        rows.append(Compared(name, reward.change, reward.ci95, loss.change, loss.ci95, ratio, apart, note))
    return rows


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


def _reward(summary: Mapping[str, object]) -> Measure:
    before, after = number(summary.get("ocr_before")), number(summary.get("ocr_after"))
    ema, stderr = number(summary.get("ocr_after_ema")), number(summary.get("ocr_gain_stderr"))
    change = _difference(before, after)
    ci95 = _pair(summary.get("ocr_gain_ci95"))
    if ci95 is None and change is not None and stderr is not None:
        ci95 = (change - _NORMAL_95 * stderr, change + _NORMAL_95 * stderr)
    verdict, tone = _gain_verdict(change, ci95)
    return Measure("OCR reward", before, after, change, False, 3, stderr, ci95, ema,
                   _difference(before, ema), verdict, tone)  # fmt: skip


def _gain_verdict(change: float | None, ci95: tuple[float, float] | None) -> tuple[str, Tone]:
    if change is None:
        return "", "none"
    if ci95 is None:
        return "no interval", "none"
    if ci95[0] > 0:
        return "clear gain", "good"
    if ci95[1] < 0:
        return "clear loss", "bad"
    return "no clear change", "warn"


def _exact_match(summary: Mapping[str, object]) -> Measure:
    before, after = number(summary.get("exact_match_before")), number(summary.get("exact_match_after"))
    ema = number(summary.get("exact_match_after_ema"))
    stderr, ci95 = number(summary.get("exact_match_gain_stderr")), _pair(summary.get("exact_match_gain_ci95"))
    return Measure("Exact match", before, after, _difference(before, after), False, 3, stderr, ci95, ema,
                   _difference(before, ema))  # fmt: skip


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
    return Measure("Diffusion loss", before, after, rise, True, 4, stderr, ci95, ema,
                   relative_change(before, ema), verdict, tone)  # fmt: skip


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
