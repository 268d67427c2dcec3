"""Log-density of a Gaussian step, as a **mean over latent entries**: the convention of all public code (sums overflow a
probability ratio)."""

from __future__ import annotations

import math

from torch import Tensor

MIN_STD = 1e-4
"""Smallest standard deviation of a transition that may be trained, in units of the kernel's states."""


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, scaling: str = "exact") -> Tensor:
    """Log-density of `x_next` `[B, …]` under N(mean, std²), **mean** over entries, `[B]` fp32.

    Args:
        scaling: `exact` = -(‖x'-μ‖²)/(2 std²) - log std - ½ log 2π; `unscaled` = -‖x'-μ‖² (the public DDRL code:
            no variance, no constants); `std_weighted` = exact's quadratic part times std (between the two).
    Raises:
        ValueError: unknown scaling.
    """
    square = (x_next.float() - mean).square().flatten(1).mean(1)
    if scaling == "exact":
        return -square / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    if scaling == "unscaled":
        return -square
    if scaling == "std_weighted":
        return -square / (2 * std)
    raise ValueError(f"unknown log-prob scaling {scaling!r}; known: exact, unscaled, std_weighted")
