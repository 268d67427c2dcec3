"""Times of a flow and noise levels sigma, for policies whose network predicts the velocity eps - x_0."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from diffusion.processes.base import ForwardProcess
from diffusion.processes.edm import EDM
from diffusion.processes.rectified_flow import RectifiedFlow

SIGMA_MEDIAN, SIGMA_SPREAD = 4.0, 1.2
"""Of the noise that the public DDRL code (nvidia-cosmos/cosmos-rl 89f2e5b5) trains a picture with: ln sigma ~ N(ln 4, 1.2²);"""
HIGH_SHARE, HIGH = 0.05, (200.0, 100_000.0)
"""of clips, this share is drawn anew, log-uniform between these."""


def _predicts_velocity(process: ForwardProcess) -> bool:
    return isinstance(process, RectifiedFlow) or (isinstance(process, EDM) and process.preconditioning == "flow")


def check_velocity(process: ForwardProcess, key: str) -> None:
    """Raises ValueError, naming `key`, for a policy whose network does not predict a flow's velocity."""
    if not _predicts_velocity(process):
        raise ValueError(f"{key} is stated for a network that predicts a flow's velocity, and this policy's process is {process.name}")


def flow_time(process: ForwardProcess, t: Tensor, key: str = "objective.data_weighting=cosmos") -> Tensor:
    """The flow's time `[B]` of times of `process`: t itself, or sigma / (1 + sigma). Raises ValueError, naming `key`, for other policies."""
    check_velocity(process, key)
    return t if isinstance(process, RectifiedFlow) else process.model_time(t)


def cosmos_times(process: ForwardProcess, n: int, frames: int, generator: torch.Generator) -> Tensor:
    """`n` training times `[n]` of `process` by the public DDRL code's law: sigma log-normal, times √(latent frames), and of clips some much higher.

    Raises:
        ValueError: a policy that does not predict a velocity.
    """
    check_velocity(process, "objective.data_times=cosmos")
    sigma = (math.log(SIGMA_MEDIAN) + SIGMA_SPREAD * torch.randn(n, generator=generator)).exp() * math.sqrt(frames)
    if frames > 1:
        chosen = torch.rand(n, generator=generator) < HIGH_SHARE
        low, high = (math.log(sigma) for sigma in HIGH)
        sigma = torch.where(chosen, (low + (high - low) * torch.rand(n, generator=generator)).exp(), sigma)
    return sigma / (1 + sigma) if isinstance(process, RectifiedFlow) else sigma
