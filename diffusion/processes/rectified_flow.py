"""Rectified flow (Liu et al. 2022), as SD3, Wan and Cosmos-Predict2.5 use it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess, bcast, wide

Grid = Literal["even", "diffusers"]
Nodes = Literal["even", "diffusers", "unipc", "karras"]
RHO = 7.0
"""Exponent of the Karras grid (arXiv 2206.00364, eq. 5)."""


class RectifiedFlow(ForwardProcess):
    """x_t = (1 - t) x_0 + t eps, t in [0, 1], prediction = velocity eps - x_0 (SD3, arXiv 2403.03206).

    Args:
        shift: grid shift s, t = s u / (1 + (s - 1) u) (SD3 §5.3.2); applies to the sampling grid and to training times.
        grid: `even`: N even steps of u from 1 to 0. `diffusers`: what `FlowMatchEulerDiscreteScheduler.set_timesteps(N)` makes, N even nodes
            of u from 1 to the *shifted* smallest training time, which is so shifted twice, then 0; with shift 3 and 10 steps
            1, .9601, …, .2780, .0089, 0 where `even` has 1, .9643, …, .4286, .25, 0. `unipc`: what `UniPCMultistepScheduler` makes with
            `use_flow_sigmas`, N even nodes of u of which the next would be the smallest training time, the first 1e-6 below 1 (Wan).
            `karras`: the same scheduler's with `use_karras_sigmas`, sigma / (1 + sigma) of Karras' grid, which begins below 1 (Cosmos-Predict2.5).
        train_times: noise levels that the policy was trained on, for the lower end of the `diffusers` and `unipc` grids.
        sigmas: largest and smallest sigma of the `karras` grid.
    """

    name = "rectified_flow"

    def __init__(self, shift: float = 1.0, grid: Nodes = "even", train_times: int = 1000, sigmas: tuple[float, float] = (200.0, 0.01)) -> None:
        if shift <= 0:
            raise ValueError(f"shift must be positive, got {shift}")
        self.shift, self.grid, self.train_times, self.sigmas = shift, grid, train_times, sigmas

    def _shifted(self, u: Tensor) -> Tensor:
        return self.shift * u / (1 + (self.shift - 1) * u)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()
        return 1 - t, t

    def start_share(self, t: float) -> float:
        """As the base says; but the pipelines of Cosmos-Predict2.5 start the `karras` grid from pure noise, though it begins at .995."""
        highest = self.sigmas[0] / (1 + self.sigmas[0])
        return 1.0 if self.grid == "karras" and abs(t - highest) < 1e-6 else super().start_share(t)

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
        if self.grid == "karras":
            high, low = (sigma ** (1 / RHO) for sigma in self.sigmas)
            sigma = torch.linspace(high, low, steps, dtype=torch.float64) ** RHO
            return torch.cat([sigma / (1 + sigma), sigma.new_zeros(1)]).float()
        if self.grid == "unipc":
            nodes = self._shifted(torch.linspace(1, 1 / self.train_times, steps + 1, dtype=torch.float64)[:-1])
            nodes[0] -= 1e-6
            return torch.cat([nodes, nodes.new_zeros(1)]).float()
        lowest = self._shifted(torch.tensor(1 / self.train_times, dtype=torch.float64))
        nodes = self._shifted(torch.linspace(1, float(lowest), steps, dtype=torch.float64))
        return torch.cat([nodes, nodes.new_zeros(1)]).float()

    def quantiles(self, u: Tensor) -> Tensor:
        """Of the law of `sample_times`."""
        return self._shifted(torch.sigmoid(torch.special.ndtri(u.clamp(1e-3, 1 - 1e-3))))

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Logit-normal(0, 1) times (SD3 §3.1), shifted."""
        u = torch.sigmoid(torch.randn(n, generator=generator))
        return self._shifted(u)
