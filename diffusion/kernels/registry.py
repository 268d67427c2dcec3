"""Step kernels by name."""

from __future__ import annotations

from diffusion.kernels.base import StepKernel
from diffusion.kernels.edm import EDM2AB, Ancestral, EDMEuler
from diffusion.kernels.flow import ConstantSDE, FlowSDE
from diffusion.kernels.marginal import CPS, DDIMEta
from diffusion.processes import ForwardProcess

_KERNELS: dict[str, type[StepKernel]] = {k.name: k for k in (FlowSDE, ConstantSDE, CPS, DDIMEta, EDMEuler, EDM2AB, Ancestral)}


def make_kernel(name: str, process: ForwardProcess, noise_level: float, steps: int) -> StepKernel:
    """Kernel by name for a policy of `process` and a grid of `steps` steps.

    Raises:
        ValueError: an unknown name (the message lists the known ones), a policy that the kernel does not fit, too few steps.
    """
    if name not in _KERNELS:
        raise ValueError(f"unknown step kernel {name!r}; known: {', '.join(sorted(_KERNELS))}")
    return _KERNELS[name](process, noise_level, steps)
