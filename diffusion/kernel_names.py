"""Names of the step kernels and which of their steps may draw noise. Pure Python: settings are checked without torch."""

from __future__ import annotations

from typing import Literal, get_args

KernelName = Literal["flow_sde", "constant_sde", "cps", "ddim_eta", "edm_euler", "edm_2ab", "ancestral"]
KERNEL_NAMES: tuple[str, ...] = get_args(KernelName)

CHURN = ("edm_euler", "edm_2ab")
"""Kernels that end with a deterministic step onto the smallest noise level and a deterministic clean-up."""


def stochastic_steps(name: str, steps: int) -> int:
    """How many leading steps of a grid of `steps` may draw noise: all but the last, or the last two of a churn kernel."""
    return max(0, steps - (2 if name in CHURN else 1))
