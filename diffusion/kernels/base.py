"""What a step kernel is.

A kernel turns a network prediction at time `t` into the moments of the next state at `t_next < t`. Sampling draws from
them; training scores the stored next state under them. A transition with zero or tiny standard deviation has no usable
density and is never trained (`MIN_STD`). States are fp32; a
kernel's coefficients may be worked out in fp64, and its mean is fp64 where prediction and state are: log-densities are.

The states live in the space of `kernel.process`, which is the policy's own process, or the same policy seen in sigma space.
Either way the network is called as `model(kernel.process.model_input(x, t), kernel.process.model_time(t), …)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor

from diffusion.processes import ForwardProcess, bcast


@dataclass(frozen=True)
class Previous:
    """What a two-step kernel knows of the step before.

    Attributes:
        x0: the prediction of x_0 made there, `[B, …]`; zeros where there was no such step.
        t: its time `[B]`; inf where there was no such step, which makes the formula the one-step one.
    """

    x0: Tensor
    t: Tensor


def ode_step(process: ForwardProcess, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor) -> Tensor:
    """Deterministic step along the probability-flow ODE: a' x̂0 + s' ε̂ (DDIM with eta 0).

    It is the Euler step of a rectified flow, and of EDM's ODE in sigma.
    """
    x0, eps = process.split(prediction, x, t)
    a, s = process.coefficients(t_next)
    return bcast(a, x0) * x0 + bcast(s, x0) * eps


class StepKernel(ABC):
    """A family of Gaussian steps with one noise parameter.

    Args:
        process: the policy's forward process.
        noise_level: the kernel's noise parameter (a, g, eta, or s_churn).
        steps: denoising steps of its grid.
    Attributes:
        process: the space that the states live in, see the module's docstring.
        uses_previous: True for a two-step kernel, which needs `previous` in `moments` and `ode`.
    """

    name: str
    uses_previous = False

    def __init__(self, process: ForwardProcess, noise_level: float, steps: int) -> None:
        self.process = self._space(process)
        self.noise_level, self.steps = noise_level, steps

    def _space(self, process: ForwardProcess) -> ForwardProcess:
        """The space of this kernel's states for a policy of `process`. Raises ValueError when the policy does not fit."""
        return process

    def time_grid(self, steps: int) -> Tensor:
        """`steps + 1` decreasing times, `[steps + 1]` fp32; the last is 0."""
        return self.process.time_grid(steps)

    def start(self, noise: Tensor) -> Tensor:
        """First state from unit Gaussian noise `[…]`, fp32: the noise at its share of the grid's first time."""
        return self.process.start_share(float(self.time_grid(self.steps)[0])) * noise.float()

    @abstractmethod
    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> tuple[Tensor, Tensor]:
        """Mean `[B, …]` and standard deviation `[B]` of the next state.

        Args:
            prediction: network output at `(x, t)`, `[B, …]`.
            x: current state `[B, …]`.
            t, t_next: times `[B]`, neighbours on the kernel's grid, t > t_next ≥ 0.
            previous: needed by kernels with `uses_previous`, ignored by the others.
        """

    def ode(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> Tensor:
        """Next state without noise, by this kernel's solver; arguments as in `moments`."""
        return ode_step(self.process, prediction, x, t, t_next)
