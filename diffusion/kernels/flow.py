"""Reverse SDEs of a rectified flow with diffusion g: Flow-GRPO (arXiv 2505.05470) and DanceGRPO (arXiv 2505.07818)."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from diffusion.kernels.base import Previous, StepKernel
from diffusion.processes import ForwardProcess, RectifiedFlow, bcast, wide


class _ReverseSDE(StepKernel):
    """mean = x - d (v + g²/(2t) (x + (1 - t) v)), std = g √d, with d = t - t_next; Euler step of the reverse SDE."""

    @abstractmethod
    def _g(self, t: Tensor) -> Tensor: ...

    def _space(self, process: ForwardProcess) -> ForwardProcess:
        if not isinstance(process, RectifiedFlow):
            raise ValueError(f"step kernel {self.name} is a rectified flow's; for a policy of process {process.name} take ddim_eta, cps or an EDM kernel")
        return process

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> tuple[Tensor, Tensor]:
        v, x = wide(prediction), wide(x)
        t, t_next = t.float(), t_next.float()
        g = self._g(t)
        tt, dd, gg = bcast(t, x), bcast(t - t_next, x), bcast(g, x)
        mean = x - dd * (v + gg.square() / (2 * tt) * (x + (1 - tt) * v))
        return mean, g * (t - t_next).sqrt()


class FlowSDE(_ReverseSDE):
    """Flow-GRPO: g = a √(t / (1 - t)); at t = 1 the denominator uses the grid's second node."""

    name = "flow_sde"

    def __init__(self, process: ForwardProcess, noise_level: float, steps: int) -> None:
        super().__init__(process, noise_level, steps)
        self.first_time = float(self.process.time_grid(steps)[1])

    def _g(self, t: Tensor) -> Tensor:
        denominator = torch.where(t >= 1, torch.full_like(t, 1 - self.first_time), 1 - t)
        return self.noise_level * (t / denominator).sqrt()


class ConstantSDE(_ReverseSDE):
    """DanceGRPO: constant g."""

    name = "constant_sde"

    def _g(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.noise_level)
