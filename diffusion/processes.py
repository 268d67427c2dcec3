"""Forward processes: how clean data is noised, and what a network prediction says about it.

One class a process. Conventions: `t` runs from 1 (noise) to 0 (data); tensors carry a leading batch dimension and
`t` is `[B]`; all arithmetic is fp32.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


def bcast(t: Tensor, like: Tensor) -> Tensor:
    """Reshape `[B]` to `[B, 1, …]` so that it broadcasts over `like` `[B, …]`."""
    return t.to(like.device, torch.float32).reshape(-1, *([1] * (like.dim() - 1)))


class ForwardProcess(ABC):
    """A noising process together with the meaning of the network's output."""

    name: str

    @abstractmethod
    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Noised sample at time `t` from clean `x0` and Gaussian `eps`, all `[B, …]`."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should predict there, `[B, …]`."""

    @abstractmethod
    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Estimates `(x0, eps)` implied by a prediction at `(x, t)`."""

    @abstractmethod
    def time_grid(self, steps: int) -> Tensor:
        """`steps + 1` decreasing times, `[steps + 1]` fp32, from 1 to 0."""

    @abstractmethod
    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """`n` training times `[n]` in (0, 1)."""

    def loss(self, prediction: Tensor, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """Diffusion loss per sample `[B]`: mean over entries of the squared prediction error."""
        error = prediction.float() - self.target(x0, eps, t)
        return error.square().flatten(1).mean(1)


class RectifiedFlow(ForwardProcess):
    """x_t = (1 - t) x_0 + t eps, prediction = velocity eps - x_0 (Liu et al. 2022; SD3, arXiv 2403.03206).

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

    def noise(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        tt = bcast(t, x0)
        return (1 - tt) * x0.float() + tt * eps.float()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        return eps.float() - x0.float()

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        tt = bcast(t, x)
        v = prediction.float()
        return x.float() - tt * v, x.float() + (1 - tt) * v

    def time_grid(self, steps: int) -> Tensor:
        u = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        return self._shifted(u).float()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Logit-normal(0, 1) times (SD3 §3.1), shifted."""
        u = torch.sigmoid(torch.randn(n, generator=generator))
        return self._shifted(u)
