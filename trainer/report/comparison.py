"""Runs side by side, as text: reward gain, diffusion-loss rise, and the paired reward difference to the first run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.report.outcome import compare
from trainer.report.summary import reward_against

HEADER = ("run", "OCR gain [95 %]", "loss rise [95 %]", "rise / first", "apart", "OCR above first (std. error)")


def _interval(value: float | None, interval: tuple[float, float] | None, percent: bool) -> str:
    if value is None:
        return "-"

    def spell(x: float) -> str:
        return f"{100 * x:+.1f} %" if percent else f"{x:+.3f}"

    return spell(value) + (f" [{spell(interval[0])}, {spell(interval[1])}]" if interval else "")


def comparison_table(folders: list[Path]) -> str:
    """Aligned plain-text table of run folders; the first is the reference. A run without a summary shows dashes."""
    summaries: list[tuple[str, dict[str, Any]]] = []
    for folder in folders:
        file = folder / "summary.json"
        summaries.append((folder.name, json.loads(file.read_text()) if file.exists() else {}))
    rows = [HEADER]
    for folder, row in zip(folders, compare(summaries), strict=True):
        difference = None if folder is folders[0] else reward_against(folders[0], folder)
        rows.append(
            (
                row.name,
                _interval(row.gain, row.gain_ci95, percent=False),
                _interval(row.rise, row.rise_ci95, percent=True),
                "-" if row.ratio is None else f"{row.ratio:.1f}x",
                {True: "yes", False: "no", None: "-"}[row.apart],
                "-" if difference is None else f"{difference[0]:+.3f} ({difference[1]:.3f})",
            )
        )
    widths = [max(len(r[i]) for r in rows) for i in range(len(HEADER))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(r, widths, strict=True)).rstrip() for r in rows)
