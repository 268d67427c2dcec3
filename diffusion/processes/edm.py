"""EDM (Karras et al. 2022, arXiv 2206.00364): noise is added and the data keeps its scale; time is sigma.

The denoiser is D(x; sigma) = c_skip x + c_out F(c_in x; c_noise) with one of two preconditionings:

- `edm` (the paper's table 1): c_skip = d²/(sigma² + d²), c_out = sigma d/√(sigma² + d²), c_in = 1/√(sigma² + d²),
  c_noise = ln(sigma)/4, with d the standard deviation of the data;
- `flow`: F is the velocity network of a rectified flow. With t = sigma/(1 + sigma) the two states are multiples of each other,
  x_EDM = (1 + sigma) x_RF, so c_skip = c_in = 1 - t, c_out = -t, c_noise = t (how the public DDRL code samples).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess, bcast, wide
from diffusion.processes.rectified_flow import RectifiedFlow


def karras_nodes(n: int, sigma_max: float, sigma_min: float, rho: float) -> Tensor:
    """`n` noise levels from `sigma_max` down to `sigma_min`, evenly spaced in sigma^(1/rho); fp64 `[n]` (paper, eq. 5)."""
    high, low = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    nodes = torch.linspace(high, low, n, dtype=torch.float64) ** rho
    ends = torch.tensor([sigma_max, sigma_min], dtype=torch.float64)
    nodes[0] = ends[0]  # powers and roots leave the ends a rounding error away
    if n > 1:
        nodes[-1] = ends[1]
    return nodes


class EDM(ForwardProcess):
    """x = x_0 + sigma eps, time = sigma.

    Args:
        preconditioning: `edm` or `flow`, see the module's docstring.
        sigma_min, sigma_max, rho: Karras grid.
        sigma_data: standard deviation of the data (`edm` only).
        prediction: sign of c_out: `epsilon` = the paper's, `v_prediction` = negative (`edm` only; diffusers' names).
        p_mean, p_std: training noise is log-normal, ln sigma ~ N(p_mean, p_std²).
    Raises:
        ValueError: a range that is empty or not positive, an unknown preconditioning or prediction.
    """

    name = "edm"

    def __init__(
        self,
        preconditioning: Literal["edm", "flow"] = "edm",
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        rho: float = 7.0,
        sigma_data: float = 0.5,
        prediction: Literal["epsilon", "v_prediction"] = "epsilon",
        p_mean: float = -1.2,
        p_std: float = 1.2,
    ) -> None:
        if preconditioning not in ("edm", "flow"):
            raise ValueError(f"unknown preconditioning {preconditioning!r}; known: edm, flow")
        if prediction not in ("epsilon", "v_prediction"):
            raise ValueError(f"unknown prediction {prediction!r} of an EDM network; known: epsilon, v_prediction")
        if not 0 < sigma_min < sigma_max:
            raise ValueError(f"0 < sigma_min < sigma_max must hold, got {sigma_min:g} and {sigma_max:g}")
        if rho <= 0 or sigma_data <= 0 or p_std <= 0:
            raise ValueError(f"rho, sigma_data and p_std must be positive, got {rho:g}, {sigma_data:g}, {p_std:g}")
        self.preconditioning, self.sigma_data = preconditioning, sigma_data
        self.sigma_min, self.sigma_max, self.rho = sigma_min, sigma_max, rho
        self.sign = 1.0 if prediction == "epsilon" else -1.0
        self.p_mean, self.p_std = p_mean, p_std

    @classmethod
    def of_flow(cls, flow: RectifiedFlow) -> EDM:
        """The same policy in sigma space, with the public DDRL grid: sigma from 200 to 0.01, rho 7.

        The flow's shifted logit-normal times are log-normal noise levels: ln sigma = ln shift + N(0, 1).
        """
        return cls("flow", sigma_min=0.01, sigma_max=200.0, p_mean=math.log(flow.shift), p_std=1.0)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.float()
        return torch.ones_like(t), t

    def _hypotenuse(self, sigma: Tensor) -> Tensor:
        return (sigma.square() + self.sigma_data**2).sqrt()

    def target(self, x0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """(x_0 - c_skip x) / c_out, written without the cancellation: `flow` gives the velocity eps - x_0."""
        x0, eps = x0.float(), eps.float()
        if self.preconditioning == "flow":
            return eps - x0
        sigma, d = bcast(t, x0), self.sigma_data
        return self.sign * (sigma * x0 - d**2 * eps) / (d * self._hypotenuse(sigma))

    def split(self, prediction: Tensor, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        sigma, f, x = bcast(t, x), wide(prediction), wide(x)
        if self.preconditioning == "flow":
            return (x - sigma * f) / (1 + sigma), (x + f) / (1 + sigma)
        d, h = self.sigma_data, self._hypotenuse(sigma)
        f = self.sign * f
        return (d / h).square() * x + sigma * d / h * f, sigma / h.square() * x - d / h * f

    def model_input(self, x: Tensor, t: Tensor) -> Tensor:
        sigma = bcast(t, x)
        return x.float() / (1 + sigma if self.preconditioning == "flow" else self._hypotenuse(sigma))

    def model_time(self, t: Tensor) -> Tensor:
        """c_noise, over 1000 with the `edm` preconditioning, whose networks embed ln(sigma)/4 as it is."""
        t = t.float()
        return t / (1 + t) if self.preconditioning == "flow" else t.log() / 4 / 1000

    def time_grid(self, steps: int) -> Tensor:
        """`steps` Karras nodes from sigma_max to sigma_min, then 0 (paper, algorithm 1)."""
        nodes = karras_nodes(steps, self.sigma_max, self.sigma_min, self.rho)
        return torch.cat([nodes, torch.zeros(1, dtype=torch.float64)]).float()

    def spread_times(self, u: Tensor) -> Tensor:
        """Quantiles of the log-normal noise levels of training."""
        return (self.p_mean + self.p_std * torch.special.ndtri(u.clamp(1e-3, 1 - 1e-3))).exp()

    def sample_times(self, n: int, generator: torch.Generator) -> Tensor:
        """Log-normal noise levels."""
        return (self.p_mean + self.p_std * torch.randn(n, generator=generator)).exp()
