"""Group-normalised advantages. Pure Python on lists: no torch.

A_n = (r_n - mean of the group) / (std + 1e-4), clipped to ±5 (public DDRL code; Flow-GRPO and DanceGRPO clip alike).
The standard deviation is the group's own, unbiased, or that of all rewards of the update (Flow-GRPO on SD3.5).
"""

from __future__ import annotations

import math
import statistics

EPSILON = 1e-4
"""Added to the standard deviation (public DDRL code)."""


def group_advantages(groups: list[list[float]], scale: str = "group", clip: float = 5.0, exponential: bool = False) -> list[list[float]]:
    """Advantages of every member of every group.

    Args:
        groups: rewards by group, each of at least two members, all finite.
        scale: `group` or `batch`: whose standard deviation divides.
        clip: bound on |A|.
        exponential: map A to -exp(-A) before clipping (the theory's lambda, DDRL §1.2), which restores the exact
            exponential tilt in form.
    Raises:
        ValueError: a group with fewer than two members or a reward that is not finite.
    """
    for rewards in groups:
        if len(rewards) < 2:
            raise ValueError(f"a group needs at least 2 rewards, got {len(rewards)}")
        if not all(math.isfinite(r) for r in rewards):
            raise ValueError(f"rewards must be finite numbers, got {rewards}")
    pooled = statistics.stdev([r for rewards in groups for r in rewards]) if scale == "batch" else None
    return [_one(rewards, pooled, clip, exponential) for rewards in groups]


def _one(rewards: list[float], pooled: float | None, clip: float, exponential: bool) -> list[float]:
    mean = statistics.fmean(rewards)
    std = statistics.stdev(rewards) if pooled is None else pooled
    raw = [(r - mean) / (std + EPSILON) for r in rewards]
    # -exp(-A) overflows for very negative A; anything below -clip is clipped anyway
    mapped = [-math.exp(-max(a, -clip)) for a in raw] if exponential else raw
    return [max(-clip, min(clip, a)) for a in mapped]


def zero_variance(groups: list[list[float]]) -> int:
    """Groups whose members all have the same reward: nothing in them is better than the rest (their advantages are all
    0, or all -1 after the exponential map)."""
    return sum(1 for rewards in groups if max(rewards) - min(rewards) < 1e-9)
