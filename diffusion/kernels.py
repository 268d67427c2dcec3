"""Step kernels: one denoising step as a Gaussian with a mean and a scalar standard deviation.

A kernel turns a network prediction at time `t` into the moments of the next state at `t_next < t`. Sampling draws from
them; training scores the stored next state under them. A transition with zero or tiny standard deviation has no usable
density and is never trained (`MIN_STD`). All arithmetic is fp32; log-densities are **means over latent entries**, the
convention of all public code (sums overflow a probability ratio).

Formulas: reverse SDE of a rectified flow with diffusion g (Flow-GRPO, arXiv 2505.05470; DanceGRPO, arXiv 2505.07818);
CPS (Flow-CPS, arXiv 2509.05952); DDIM with eta (arXiv 2010.02502) carried over to rectified flow.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from diffusion.processes import ForwardProcess, bcast

MIN_STD = 1e-4
"""Smallest standard deviation of a transition that may be trained, in latent units."""


class StepKernel(ABC):
    """A family of Gaussian steps of a rectified flow, with one noise parameter.

    Args:
        process: the forward process whose predictions are read.
        noise_level: the kernel's noise parameter (a, g or eta).
        first_time: second node of the time grid; stands in for t = 1 where a formula divides by 1 - t.
    """

    name: str

    def __init__(self, process: ForwardProcess, noise_level: float, first_time: float) -> None:
        self.process = process
        self.noise_level = noise_level
        self.first_time = first_time

    @abstractmethod
    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        """Mean `[B, …]` and standard deviation `[B]` of the next state.

        Args:
            prediction: network output at `(x, t)`, `[B, …]`.
            x: current state `[B, …]`.
            t, t_next: times `[B]`, t > t_next ≥ 0.
        """


class _ReverseSDE(StepKernel):
    """mean = x - d (v + g²/(2t) (x + (1 - t) v)), std = g √d, with d = t - t_next; Euler step of the reverse SDE."""

    @abstractmethod
    def _g(self, t: Tensor) -> Tensor: ...

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        v, x = prediction.float(), x.float()
        t, t_next = t.float(), t_next.float()
        g = self._g(t)
        tt, dd, gg = bcast(t, x), bcast(t - t_next, x), bcast(g, x)
        mean = x - dd * (v + gg.square() / (2 * tt) * (x + (1 - tt) * v))
        return mean, g * (t - t_next).sqrt()


class FlowSDE(_ReverseSDE):
    """Flow-GRPO: g = a √(t / (1 - t)); at t = 1 the denominator uses the grid's second node."""

    name = "flow_sde"

    def _g(self, t: Tensor) -> Tensor:
        denominator = torch.where(t >= 1, torch.full_like(t, 1 - self.first_time), 1 - t)
        return self.noise_level * (t / denominator).sqrt()


class ConstantSDE(_ReverseSDE):
    """DanceGRPO: constant g."""

    name = "constant_sde"

    def _g(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.noise_level)


class CPS(StepKernel):
    """Coefficients-preserving step: std = t' sin(a π/2), mean = (1 - t') x̂0 + √(t'² - std²) ε̂."""

    name = "cps"

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        x0, eps = self.process.split(prediction, x, t)
        t_next = t_next.float()
        std = t_next * math.sin(min(self.noise_level, 1.0) * math.pi / 2)
        tn = bcast(t_next, x0)
        return (1 - tn) * x0 + bcast((t_next.square() - std.square()).clamp_min(0).sqrt(), x0) * eps, std


class DDIMEta(StepKernel):
    """DDIM with eta: std = eta t' √(1 - (t'(1-t) / (t(1-t')))²), mean = (1 - t') x̂0 + √(t'² - std²) ε̂."""

    name = "ddim_eta"

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> tuple[Tensor, Tensor]:
        x0, eps = self.process.split(prediction, x, t)
        t, t_next = t.float(), t_next.float()
        ratio = t_next * (1 - t) / (t * (1 - t_next))
        std = self.noise_level * t_next * (1 - ratio.square()).clamp_min(0).sqrt()
        tn = bcast(t_next, x0)
        return (1 - tn) * x0 + bcast((t_next.square() - std.square()).clamp_min(0).sqrt(), x0) * eps, std


def ode_step(process: ForwardProcess, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Deterministic step along the probability-flow ODE: (1 - t') x̂0 + t' ε̂, the Euler step of a rectified flow."""
    x0, eps = process.split(prediction, x, t)
    tn = bcast(t_next, x0)
    return (1 - tn) * x0 + tn * eps


_KERNELS: dict[str, type[StepKernel]] = {k.name: k for k in (FlowSDE, ConstantSDE, CPS, DDIMEta)}


def make_kernel(name: str, process: ForwardProcess, noise_level: float, steps: int) -> StepKernel:
    """Kernel by name for a grid of `steps` steps. Raises ValueError with the known names."""
    if name not in _KERNELS:
        raise ValueError(f"unknown step kernel {name!r}; known: {', '.join(sorted(_KERNELS))}")
    return _KERNELS[name](process, noise_level, float(process.time_grid(steps)[1]))


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor, scaling: str = "exact") -> Tensor:
    """Log-density of `x_next` `[B, …]` under N(mean, std²), **mean** over entries, `[B]` fp32.

    Args:
        scaling: `exact` = -(‖x'-μ‖²)/(2 std²) - log std - ½ log 2π; `unscaled` = -‖x'-μ‖² (the public DDRL code:
            no variance, no constants); `std_weighted` = exact's quadratic part times std (between the two).
    Raises:
        ValueError: unknown scaling.
    """
    square = (x_next.float() - mean).square().flatten(1).mean(1)
    if scaling == "exact":
        return -square / (2 * std.square()) - std.log() - 0.5 * math.log(2 * math.pi)
    if scaling == "unscaled":
        return -square
    if scaling == "std_weighted":
        return -square / (2 * std)
    raise ValueError(f"unknown log-prob scaling {scaling!r}; known: exact, unscaled, std_weighted")
