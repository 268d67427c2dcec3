"""Steps that split the noise of the next level into a predicted and a fresh part, for any forward process.

With x' = a' x_0 + s' eps at t_next and the estimates x̂0, ε̂: mean = a' x̂0 + √(s'² - std²) ε̂. The noise level s' is met for every
standard deviation between 0 and s'; the kernels differ in which they take.
"""

from __future__ import annotations

import math
from abc import abstractmethod

from torch import Tensor

from diffusion.kernels.base import Previous, StepKernel
from diffusion.processes import bcast


class _Marginal(StepKernel):
    @abstractmethod
    def _std(self, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
        """Standard deviation `[B]` of the fresh part from the coefficients (a, s) at `t` and at `t_next`."""

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> tuple[Tensor, Tensor]:
        x0, eps = self.process.split(prediction, x, t)
        a, s = self.process.coefficients(t_next)
        std = self._std(self.process.coefficients(t), (a, s))
        return bcast(a, x0) * x0 + bcast((s.square() - std.square()).clamp_min(0).sqrt(), x0) * eps, std


class CPS(_Marginal):
    """Coefficients-preserving step: std = s' sin(a π/2), a the noise level (Flow-CPS, arXiv 2509.05952)."""

    name = "cps"

    def _std(self, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
        return then[1] * math.sin(min(self.noise_level, 1.0) * math.pi / 2)


class DDIMEta(_Marginal):
    """DDIM with eta: std = eta s' √(1 - (s' a / (s a'))²) (arXiv 2010.02502, eq. 16, in terms of the coefficients).

    eta = 1 draws from the posterior q(x' | x, x̂0) of the forward process.
    """

    name = "ddim_eta"

    def _std(self, now: tuple[Tensor, Tensor], then: tuple[Tensor, Tensor]) -> Tensor:
        (a, s), (a_next, s_next) = now, then
        ratio = s_next * a / (s * a_next)
        return self.noise_level * s_next * (1 - ratio.square()).clamp_min(0).sqrt()
