"""Log-density of a Gaussian step, as a **mean over latent entries**: the convention of all public code (sums overflow a
probability ratio).

A ratio comes from the difference of two densities, which `unscaled` multiplies by 2 std²: at std 47 that is 4,400, and an error
of half a unit in the last place of an fp32 density, or of an fp32 mean near 200, would move the ratio by more than a clip of
1e-3. So mean and density of a stochastic step are fp64 on both sides; constants cancel in the difference.
"""

from __future__ import annotations

import math

from torch import Tensor

MIN_STD = 1e-4
"""Smallest standard deviation of a transition that may be trained, in units of the kernel's states."""


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, scaling: str = "exact") -> Tensor:
    """Log-density of `x_next` `[B, …]` under N(mean, std²), **mean** over entries, `[B]` fp64. `mean` should be fp64 too.

    Args:
        scaling: `exact` = -(‖x'-μ‖²)/(2 std²) - log std - ½ log 2π; `unscaled` = -‖x'-μ‖² (the public DDRL code:
            no variance, no constants); `std_weighted` = exact's quadratic part times std (between the two).
    Raises:
        ValueError: unknown scaling.
    """
    square, std = (x_next.double() - mean.double()).square().flatten(1).mean(1), std.double()
    if scaling == "exact":
        return -square / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    if scaling == "unscaled":
        return -square
    if scaling == "std_weighted":
        return -square / (2 * std)
    raise ValueError(f"unknown log-prob scaling {scaling!r}; known: exact, unscaled, std_weighted")
