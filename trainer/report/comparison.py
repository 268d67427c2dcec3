"""Runs side by side, as text: each reward's gain with the paired difference to the first run, and the diffusion-loss rise.

Only what is the same is compared (evaluation set, reward and its revision); what is not is said, with the reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.report.outcome import Compared, compare, summary_of
from trainer.report.reading import load_run
from trainer.report.summary import reward_against

GAIN = ("run", "gain [95 %]", "above first (std. error)")
LOSS = ("run", "rise [95 %]", "rise / first", "apart")


def comparison_table(folders: list[Path]) -> str:
    """Aligned plain-text tables, one a reward and one for the diffusion loss; the first run is the reference. A run without
    numbers shows dashes. Raises FileNotFoundError."""
    runs = [load_run(folder) for folder in folders]
    compared = compare([(folder.name, summary_of(run)[0]) for folder, run in zip(folders, runs, strict=True)])
    parts = [_reward_table(reward, folders, compared) for reward in dict.fromkeys(name for row in compared for name in row.gains)]
    loss = [(row.name, _interval(row.rise, row.rise_ci95, percent=True), _ratio(row), {True: "yes", False: "no", None: "-"}[row.apart]) for row in compared]
    return "\n\n".join([*parts, "diffusion loss\n" + _aligned([LOSS, *loss])])


def _reward_table(reward: str, folders: Sequence[Path], compared: Sequence[Compared]) -> str:
    rows: list[Sequence[str]] = [GAIN]
    found = [row.gains[reward] for row in compared if reward in row.gains]
    for folder, row in zip(folders, compared, strict=True):
        gain = row.gains.get(reward)
        rows.append(
            (row.name, _interval(gain.change, gain.ci95, percent=False) if gain else "-", "-" if row is compared[0] else _above(reward, folders[0], folder))
        )
    return f"{found[0].title}\n{_aligned(rows)}"


def _above(reward: str, reference: Path, other: Path) -> str:
    difference = reward_against(reference, other, reward)
    return f"not compared: {difference}" if isinstance(difference, str) else f"{difference[0]:+.3f} ({difference[1]:.3f})"


def _ratio(row: Compared) -> str:
    return f"{row.ratio:.1f}x" if row.ratio is not None else "-" if row.note == "reference" else f"- ({row.note})"


def _interval(value: float | None, interval: tuple[float, float] | None, percent: bool) -> str:
    if value is None:
        return "-"

    def spell(x: float) -> str:
        return f"{100 * x:+.1f} %" if percent else f"{x:+.3f}"

    return spell(value) + (f" [{spell(interval[0])}, {spell(interval[1])}]" if interval else "")


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
