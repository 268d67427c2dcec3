"""Rectified flow (Liu et al. 2022), as SD3, Wan and Cosmos-Predict2.5 use it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess, bcast, wide

Grid = Literal["even", "diffusers"]


class RectifiedFlow(ForwardProcess):
    """x_t = (1 - t) x_0 + t eps, t in [0, 1], prediction = velocity eps - x_0 (SD3, arXiv 2403.03206).

    Args:
        shift: grid shift s, t = s u / (1 + (s - 1) u) (SD3 §5.3.2); applies to the sampling grid and to training times.
        grid: `even`: N even steps of u from 1 to 0. `diffusers`: what `FlowMatchEulerDiscreteScheduler.set_timesteps(N)` makes, N even nodes
            of u from 1 to the *shifted* smallest training time, which is so shifted twice, then 0; with shift 3 and 10 steps
            1, .9601, …, .2780, .0089, 0 where `even` has 1, .9643, …, .4286, .25, 0.
        train_times: noise levels that the policy was trained on, for the `diffusers` grid's lower end.
    """

    name = "rectified_flow"

    def __init__(self, shift: float = 1.0, grid: Grid = "even", train_times: int = 1000) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift, self.grid, self.train_times = shift, grid, train_times

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
        """Shifted spacing from 1 to 0, see `grid`."""
        if self.grid == "even":
            return self._shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).float()
        lowest = self._shifted(torch.tensor(1 / self.train_times, dtype=torch.float64))
        nodes = self._shifted(torch.linspace(1, float(lowest), steps, dtype=torch.float64))
        return torch.cat([nodes, nodes.new_zeros(1)]).float()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Logit-normal(0, 1) times (SD3 §3.1), shifted."""
        u = torch.sigmoid(torch.randn(n, generator=generator))
        return self._shifted(u)
