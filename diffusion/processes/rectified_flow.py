"""Rectified flow (Liu et al. 2022), as SD3, Wan and Cosmos-Predict2.5 use it."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess, bcast, wide


class RectifiedFlow(ForwardProcess):
    """x_t = (1 - t) x_0 + t eps, t in [0, 1], prediction = velocity eps - x_0 (SD3, arXiv 2403.03206).

    Args:
        shift: grid shift s, t = s u / (1 + (s - 1) u) (SD3 §5.3.2); applies to the sampling grid and to training times.
    """

    name = "rectified_flow"

    def __init__(self, shift: float = 1.0) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift = shift

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()
        return 1 - t, t

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps.float() - x0.float()

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        tt = bcast(t, x)
        v, x = wide(prediction), wide(x)
        return x - tt * v, x + (1 - tt) * v

    def time_grid(self, steps: int) -> Tensor:
        """Shifted even spacing from 1 to 0."""
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self._shifted(u).float()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Logit-normal(0, 1) times (SD3 §3.1), shifted."""
        u = torch.sigmoid(torch.randn(n, generator=generator))
        return self._shifted(u)
