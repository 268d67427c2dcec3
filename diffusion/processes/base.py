"""What a forward process is.

Every process noises data as x_t = a(t) x_0 + s(t) eps. Conventions: time falls from noise to data and ends at 0, where
a = 1 and s = 0; its unit is the process's own (1 … 0, or sigma). Tensors carry a leading batch dimension and times are
`[B]`; arithmetic is fp32, coefficients may be worked out in fp64;
`split` keeps fp64 of a caller who needs it (log-densities).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor


def wide(x: Tensor) -> Tensor:
    """fp32, or fp64 where the caller works in it."""
    return x if x.dtype == torch.float64 else x.float()


def bcast(t: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]` to `[B, 1, …]` so that it broadcasts over `like` `[B, …]`; on `like`'s device, fp64 where `like` is, else fp32."""
    return t.to(like.device, torch.float64 if like.dtype == torch.float64 else torch.float32).reshape(-1, *([1] * (like.dim() - 1)))


class ForwardProcess(ABC):
    """A noising process together with the meaning of the network's output."""

    name: str

    @abstractmethod
    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Data and noise shares `(a, s)` of x_t = a x_0 + s eps at times `[B]`, each `[B]` fp32."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict for the sample noised from `x0` with `eps` to time `t`, `[B, …]`."""

    @abstractmethod
    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates `(x0, eps)` implied by a prediction at `(x, t)`."""

    @abstractmethod
    def time_grid(self, steps: int) -> Tensor:
        """`steps + 1` decreasing times, `[steps + 1]` fp32; the last is 0."""

    def start_share(self, t: float) -> float:
        """How much of unit noise a sample starts from at the first time `t` of its grid: the share that noise has there."""
        return float(self.coefficients(torch.tensor([t]))[1])

    def on_grid(self, times: Sequence[float]) -> Self:
        """This process with a given sampling grid: decreasing times in its own unit, the last 0. Raises ValueError."""
        grid = torch.tensor(times, dtype=torch.float32)
        if len(grid) < 2 or float(grid[-1]) != 0 or not bool((grid[1:] < grid[:-1]).all()):
            raise ValueError(f"a time grid has at least two decreasing times and ends at 0, got {tuple(times)}")
        other = copy.copy(self)
        other.time_grid = lambda steps: grid  # type: ignore[method-assign]
        return other

    @abstractmethod
    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` training times `[n]`, none of them 0."""

    def spread_times(self, u: Tensor) -> Tensor:
        """Times `[n]` for held-out losses at fixed points, from `u` `[n]` spread over (0, 1): here evenly spread themselves, whatever
        the density that training draws from."""
        return u.clamp(1e-3, 1 - 1e-3)

    def quantiles(self, u: Tensor) -> Tensor:
        """Times `[n]` below which shares `u` `[n]`, in (0, 1), of the training times lie: here those of `spread_times`."""
        return self.spread_times(u)

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noised sample at time `t` from clean `x0` and Gaussian `eps`, all `[B, …]`."""
        a, s = self.coefficients(t)
        return bcast(a, x0) * x0.float() + bcast(s, x0) * eps.float()

    def model_input(self, x: Tensor, t: Tensor) -> Tensor:
        """What the network is shown instead of the state `x` `[B, …]` at `t` `[B]`: c_in(t) x. Here: the state itself."""
        return x

    def model_time(self, t: Tensor) -> Tensor:
        """Time the network is given, `[B]`. Networks multiply it by 1000 before they embed it. Here: `t` itself."""
        return t

    def loss(self, prediction: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Diffusion loss per sample `[B]`: mean over entries of the squared prediction error."""
        error = prediction.float() - self.target(x0, eps, t)
        return error.square().flatten(1).mean(1)
