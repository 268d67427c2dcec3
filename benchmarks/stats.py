"""Medians with their range, percentiles, and taking turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def spread(values: Sequence[float]) -> dict[str, Any]:
    """`{"median", "low", "high", "n"}` of some repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def percentile(values: Sequence[float], share: float) -> float:
    """The nearest-rank percentile: the least value that at least `share` of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -(-int(share * 1000) * len(ordered) // 1000) - 1))]


def interleaved(sides: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int) -> dict[str, dict[str, list[float]]]:
    """Run every side once per repeat, each time starting with another one; `{side: {figure: [one per repeat]}}`.

    A first round is run and forgotten: connections, loaded scripts and warm caches are nobody's advantage.
    """
    order = list(sides)
    found: dict[str, dict[str, list[float]]] = {name: {} for name in order}
    for repeat in range(-1, repeats):
        turn = max(repeat, 0) % len(order)
        for name in order[turn:] + order[:turn]:
            figures = sides[name]()
            if repeat >= 0:
                for figure, value in figures.items():
                    found[name].setdefault(figure, []).append(value)
    return found
