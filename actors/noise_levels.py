"""The held-out diffusion loss by noise level: what an evaluation records, and what a summary pairs. No torch."""

from __future__ import annotations

from collections.abc import Sequence

BANDS = ("least_noise", "less_noise", "more_noise", "most_noise")
"""Quarters of the range of noise levels, (0, 1)."""
LEAST_POINTS = 2
"""Of a band, below which it has no standard error."""


def by_band(levels: Sequence[float], losses: Sequence[float]) -> dict[str, list[float]]:
    """Losses of the points of each band, in their order; nothing where a band has fewer than `LEAST_POINTS`. Both `[points]`."""
    found: dict[str, list[float]] = {name: [] for name in BANDS}
    for level, loss in zip(levels, losses, strict=True):
        found[BANDS[min(int(level * len(BANDS)), len(BANDS) - 1)]].append(loss)  # a level of 1 is one that was rounded
    return found if min(map(len, found.values())) >= LEAST_POINTS else {}
