"""What the engine takes and gives: a request for one sample, and its finished trajectory."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SampleRequest:
    """One sample to draw.

    Attributes:
        id: caller's name of the request.
        prompt_embeds, pooled: conditioning `[L, D]`, `[P]`.
        shape: latent shape (C, h, w).
        seed, group, member: name of the sample's noise (`diffusion.seeds.step_noise`).
        steps: denoising steps.
        kernel, noise_level: step kernel of the stochastic steps.
        stochastic: step indices that draw noise; the others follow the ODE. Empty = a deterministic sample.
        trained: step indices whose transitions are stored, ascending; a subset of `stochastic`.
        same_start: start from member 0's noise, so that a whole group shares it.
    """

    id: int
    prompt_embeds: Tensor
    pooled: Tensor
    shape: tuple[int, int, int]
    seed: int
    group: int
    member: int
    steps: int
    kernel: str = "flow_sde"
    noise_level: float = 0.7
    stochastic: frozenset[int] = frozenset()
    trained: tuple[int, ...] = ()
    same_start: bool = False

    def __post_init__(self) -> None:
        if not set(self.trained) <= self.stochastic:
            raise ValueError(f"trained steps {self.trained} must be stochastic; stochastic steps are {sorted(self.stochastic)}")
        if list(self.trained) != sorted(set(self.trained)):
            raise ValueError(f"trained steps {self.trained} must be ascending")
        if any(not 0 <= i < self.steps - 1 for i in self.stochastic):
            raise ValueError(f"stochastic steps {sorted(self.stochastic)} must lie in 0..{self.steps - 2}: the last step is deterministic")


@dataclass(frozen=True)
class Trajectory:
    """A finished sample. K = number of trained steps; all tensors fp32 on the CPU.

    Attributes:
        latent: final sample `[C, h, w]`.
        x, x_next: states before and after each trained step, `[K, C, h, w]`.
        log_prob: exact log-density (mean over entries) of each trained transition under the weights that drew it, `[K]`.
        times: the whole time grid that was used, `[steps + 1]`.
        version: oldest weight version that took part.
    """

    request: SampleRequest
    latent: Tensor
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    times: Tensor
    version: int
