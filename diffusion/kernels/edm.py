"""Kernels in sigma space: EDM's stochastic sampler ("churn") and its ancestral one, for EDM and rectified-flow policies.

**Churn** (Karras et al. 2022, arXiv 2206.00364, algorithm 2; the sampler of the public DDRL code). A solver step lands on the next
node and noise then lifts the state a little above it. Between two network calls that is one Gaussian step from lifted node to
lifted node, so the grid holds the lifted nodes. With S steps, sigma_0 … sigma_(S-1) the Karras nodes and
eta = min(s_churn / S, √1.2 - 1):

    grid    (1+eta) sigma_0, …, (1+eta) sigma_(S-2), sigma_(S-1), 0
    step i  < S-2: mean = solver from (1+eta) sigma_i to sigma_(i+1),  std = sigma_(i+1) √(eta² + 2 eta)
    step S-2, onto sigma_(S-1), and step S-1, the clean-up x0 = D(x; sigma_(S-1)), are deterministic

The public code counts steps without the clean-up: its `sample_steps=20` is S = 21 here.
"""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from diffusion.kernel_names import stochastic_steps
from diffusion.kernels.base import Previous, StepKernel, ode_step
from diffusion.kernels.marginal import DDIMEta
from diffusion.processes import EDM, ForwardProcess, RectifiedFlow, bcast, karras_nodes, wide

MAX_CHURN = math.sqrt(1.2) - 1
"""Largest eta: a state's variance grows by at most a fifth."""


def sigma_space(name: str, process: ForwardProcess) -> EDM:
    """The policy seen in sigma space. Raises ValueError for a policy that has none."""
    if isinstance(process, EDM):
        return process
    if isinstance(process, RectifiedFlow):
        return EDM.of_flow(process)
    raise ValueError(f"step kernel {name} needs a rectified-flow or EDM policy; for process {process.name} take ddim_eta or cps")


class Ancestral(DDIMEta):
    """EDM's ancestral step, DDIM-eta in sigma space: std = eta sigma' √(1 - sigma'²/sigma²); eta = 1 is the posterior."""

    name = "ancestral"

    def _space(self, process: ForwardProcess) -> ForwardProcess:
        return sigma_space(self.name, process)


class _Churn(StepKernel):
    process: EDM

    def __init__(self, process: ForwardProcess, noise_level: float, steps: int) -> None:
        super().__init__(process, noise_level, steps)
        if stochastic_steps(self.name, steps) < 1:
            raise ValueError(f"step kernel {self.name} needs at least 3 steps, got {steps}: its last two draw no noise")
        self.eta = min(noise_level / steps, MAX_CHURN)

    def _space(self, process: ForwardProcess) -> ForwardProcess:
        return sigma_space(self.name, process)

    def time_grid(self, steps: int) -> Tensor:
        """Lifted Karras nodes, the smallest node, 0. Raises ValueError for other than the kernel's own number of steps."""
        if steps != self.steps:
            raise ValueError(f"this {self.name} kernel is for {self.steps} steps, not {steps}: how far nodes are lifted depends on it")
        nodes = karras_nodes(steps, self.process.sigma_max, self.process.sigma_min, self.process.rho)
        lift = torch.full_like(nodes, 1 + self.eta)
        lift[-1] = 1
        return torch.cat([nodes * lift, nodes.new_zeros(1)]).float()

    @abstractmethod
    def _solve(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None) -> Tensor: ...

    def moments(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> tuple[Tensor, Tensor]:
        then = t_next.double()
        lifted = t_next > torch.tensor(self.process.sigma_min, dtype=torch.float32)  # the smallest node and 0 are not
        node = torch.where(lifted, then / (1 + self.eta), then)
        std = torch.where(lifted, node * math.sqrt(self.eta**2 + 2 * self.eta), torch.zeros_like(node))
        return self._solve(prediction, x, t, node, previous), std.float()

    def ode(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None = None) -> Tensor:
        return self._solve(prediction, x, t, t_next, previous)


class EDMEuler(_Churn):
    """Churn with Euler's solver: (sigma'/sigma) x + (1 - sigma'/sigma) x̂0."""

    name = "edm_euler"

    def _solve(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None) -> Tensor:
        return ode_step(self.process, prediction, x, t, t_next)


class EDM2AB(_Churn):
    """Churn with the two-step exponential Adams-Bashforth solver on x̂0, "2ab" of the public DDRL code.

    In log-sigma the ODE is linear with x̂0 as its forcing term, which is extrapolated from this step and the one before:

        h = ln(sigma/sigma'),  c = ln(sigma/sigma_prev)/h,  phi1 = (1 - e^-h)/h,  phi2 = (1 - phi1)/h
        b2 = phi2/c,  b1 = phi1 - b2,  mean = e^-h x + h (b1 x̂0 + b2 x̂0_prev)

    The formula is Euler's for sigma_prev = inf, so the first step needs no case of its own. The clean-up is x̂0.
    """

    name = "edm_2ab"
    uses_previous = True

    def weights(self, t: Tensor, t_next: Tensor, t_previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights of x, x̂0 and the previous x̂0 in the step from `t` to `t_next`, each `[B]` fp64; they sum to 1."""
        t, t_next, t_previous = t.double(), t_next.double(), t_previous.double()
        shrink = t_next / t
        clean_up = t_next == 0
        h = -torch.where(clean_up, torch.full_like(shrink, 0.5), shrink).log()
        phi1 = -torch.expm1(-h) / h
        phi2 = (1 - phi1) / h
        older = h * phi2 / ((t / t_previous).log() / h)
        older = torch.where(clean_up, torch.zeros_like(older), older)
        return shrink, 1 - shrink - older, older

    def _solve(self, prediction: Tensor, x: Tensor, t: Tensor, t_next: Tensor, previous: Previous | None) -> Tensor:
        if previous is None:
            raise ValueError(f"step kernel {self.name} needs the previous prediction of x0; for a first step give zeros at time inf")
        x0, _ = self.process.split(prediction, x, t)
        of_x, of_x0, of_older = self.weights(t, t_next, previous.t)
        return bcast(of_x, x0) * wide(x) + bcast(of_x0, x0) * x0 + bcast(of_older, x0) * previous.x0.to(x0.dtype)
