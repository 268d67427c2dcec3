"""Figures as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def figure(found: dict[str, Any], digits: int = 0) -> str:
    """`median (low to high)` of a `spread`."""
    return f"{found['median']:.{digits}f} ({found['low']:.{digits}f} to {found['high']:.{digits}f})"


def share(value: float) -> str:
    return f"{100 * value:.1f} %"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))
