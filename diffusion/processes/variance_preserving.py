"""Variance-preserving diffusion on a table of noise levels (DDPM, arXiv 2006.11239; Stable Diffusion 1.x and 2.x)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess, bcast, wide


class VariancePreserving(ForwardProcess):
    """x_t = √ᾱ x_0 + √(1 - ᾱ) eps, with ᾱ from a table.

    Time is k/T with k = 0 … T: k = 0 is clean data (ᾱ = 1) and k ≥ 1 is the discrete timestep k - 1 of the literature. Other
    times are rounded to the nearest k: the network has seen no others.

    Args:
        schedule: `linear` betas, or `scaled_linear`: linear in √beta (Stable Diffusion).
        beta_start, beta_end: first and last beta.
        train_steps: T.
        prediction: `epsilon`, or `v_prediction` v = √ᾱ eps - √(1 - ᾱ) x_0 (arXiv 2202.00512).
    Raises:
        ValueError: unknown schedule or prediction, betas outside (0, 1).
    """

    name = "variance_preserving"

    def __init__(
        self,
        schedule: Literal["linear", "scaled_linear"] = "linear",
        beta_start: float = 1e-4,
        beta_end: float = 0.02,
        train_steps: int = 1000,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
    ) -> None:
        if schedule not in ("linear", "scaled_linear"):
            raise ValueError(f"unknown beta schedule {schedule!r}; known: linear, scaled_linear")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"unknown prediction {prediction!r} of a variance-preserving network; known: epsilon, v_prediction")
        if not 0 < beta_start <= beta_end < 1 or train_steps < 1:
            raise ValueError(f"0 < beta_start <= beta_end < 1 and train_steps >= 1 must hold, got {beta_start:g}, {beta_end:g}, {train_steps}")
        self.prediction, self.train_steps = prediction, train_steps
        power = 2.0 if schedule == "scaled_linear" else 1.0
        betas = torch.linspace(beta_start ** (1 / power), beta_end ** (1 / power), train_steps, dtype=torch.float64) ** power
        self.alpha_bar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])

    def _index(self, t: Tensor) -> Tensor:
        return (t.double() * self.train_steps).round().long()

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha_bar = self.alpha_bar.to(t.device)[self._index(t)]
        return alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()

    def _shares(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.coefficients(t)
        return bcast(a, like), bcast(s, like)

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        if self.prediction == "epsilon":
            return eps.float()
        a, s = self._shares(t, x0)
        return a * eps.float() - s * x0.float()

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self._shares(t, x)
        f, x = wide(prediction), wide(x)
        if self.prediction == "epsilon":
            return (x - s * f) / a, f
        return a * x - s * f, s * x + a * f

    def model_time(self, t: Tensor) -> Tensor:
        """Discrete timestep k - 1, over 1000."""
        return (self._index(t) - 1).float() / 1000

    def time_grid(self, steps: int) -> Tensor:
        """Even spacing that starts at the last timestep ("trailing", arXiv 2305.08891) and ends in clean data.

        Raises ValueError for more steps than the table has.
        """
        if steps > self.train_steps:
            raise ValueError(f"{steps} steps exceed the {self.train_steps} noise levels of this policy")
        nodes = torch.linspace(self.train_steps, 0, steps + 1, dtype=torch.float64).round()
        return (nodes / self.train_steps).float()

    def spread_times(self, u: Tensor) -> Tensor:
        """Every timestep in turn."""
        return (u * self.train_steps).floor().clamp(0, self.train_steps - 1).add(1) / self.train_steps

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Every timestep equally likely."""
        return torch.randint(1, self.train_steps + 1, (n,), generator=generator).float() / self.train_steps
