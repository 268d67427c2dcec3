"""What the engine takes and gives: a request for the samples of one prompt, and a trajectory per sample."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffusion.families.conditioning import Conditioning
from diffusion.kernel_names import stochastic_steps


@dataclass(frozen=True, eq=False)
class SampleRequest:
    """`n` samples of one prompt, alike in everything but their noise. Requests are told apart by identity.

    Attributes:
        shape: latent shape (C, h, w), or (C, frames, h, w).
        steps: denoising steps, each one network evaluation (two with guidance).
        prompt, conditioning: what to draw, as text (the engine encodes it, once) or already encoded; exactly one of the two.
        n, member: the samples are members `member … member + n - 1` of their group.
        seed, group: with the member and the step, the name of each noise (`diffusion.seeds.step_noise`).
        times: time grid of this request, `steps + 1` decreasing times of the policy's process, the last 0; None = the kernel's.
        kernel, noise_level: step kernel (`diffusion.kernels`); the deterministic steps follow its solver.
        stochastic: step indices that draw noise (the SDE window). Empty = a deterministic sample.
        trained: step indices whose transitions are stored, ascending; a subset of `stochastic`.
        same_start: every member starts from member 0's noise. Steps before the first stochastic one are then the same for
            all members and are computed once.
        guidance: classifier-free guidance scale g, prediction u + g (c - u); 1 = none.
        negative_prompt, negative: what u is conditioned on, as text or already encoded.
        state_dtype: type that states are stored in, float32 or bfloat16. States are rounded to it as they are made, but for the
            sample itself, so the densities are those of what is stored.
        priority: a level is a head start in the queue (`diffusion.engine.scheduler`).
        id: the caller's name of the request, for messages.
    """

    shape: tuple[int, ...]
    steps: int
    prompt: str | None = None
    conditioning: Conditioning | None = None
    n: int = 1
    member: int = 0
    seed: int = 0
    group: int = 0
    times: tuple[float, ...] | None = None
    kernel: str = "flow_sde"
    noise_level: float = 0.7
    stochastic: frozenset[int] = frozenset()
    trained: tuple[int, ...] = ()
    same_start: bool = False
    guidance: float = 1.0
    negative_prompt: str = ""
    negative: Conditioning | None = None
    state_dtype: str = "float32"
    priority: int = 0
    id: Hashable = field(default=None)

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.conditioning is None):
            raise ValueError("a request needs a prompt or its conditioning, and not both")
        if self.n < 1:
            raise ValueError(f"a request is for at least one sample, got n={self.n}")
        if self.state_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"states are stored as float32 or bfloat16, not {self.state_dtype}")
        if self.times is not None and len(self.times) != self.steps + 1:
            raise ValueError(f"{self.steps} steps need a grid of {self.steps + 1} times, got {len(self.times)}")
        if not set(self.trained) <= self.stochastic:
            raise ValueError(f"trained steps {self.trained} must be stochastic; stochastic steps are {sorted(self.stochastic)}")
        if list(self.trained) != sorted(set(self.trained)):
            raise ValueError(f"trained steps {self.trained} must be ascending")
        noisy = stochastic_steps(self.kernel, self.steps)
        if any(not 0 <= i < noisy for i in self.stochastic):
            raise ValueError(
                f"stochastic steps {sorted(self.stochastic)} must lie in 0..{noisy - 1}: "
                f"with {self.steps} steps of {self.kernel} the {'last step is' if noisy == self.steps - 1 else 'last two steps are'} deterministic"
            )

    @property
    def members(self) -> range:
        return range(self.member, self.member + self.n)

    @property
    def guided(self) -> bool:
        return self.guidance != 1.0

    @property
    def shared_steps(self) -> int:
        """Leading steps that are the same for all members; 0 when there is nothing to share."""
        if self.n == 1 or not self.same_start:
            return 0
        return min(self.stochastic, default=self.steps)


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A finished sample. K = number of trained steps; tensors on the CPU, fp32 but for `log_prob` and what is stored in the request's
    `state_dtype`.

    Attributes:
        request, member: which sample of what.
        latent: final sample, `[*shape]`; with `given` in front it is `whole`.
        given: frames that its request was given `[C, k, h, w]`, None without.
        x, x_next: states before and after each trained step, `[K, *shape]`, in `state_dtype`.
        log_prob: exact log-density (mean over entries, fp64) of each trained transition under the weights that drew it, `[K]`.
        times: the whole time grid that was used (the sigma table), `[steps + 1]`.
        previous: prediction of x0 in the step before each trained step, `[K, *shape]` in `state_dtype` (zeros before the first step), for
            kernels that use it; else None.
        versions: oldest and newest weight version that took part.
    """

    request: SampleRequest
    member: int
    latent: Tensor
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    times: Tensor
    previous: Tensor | None
    versions: tuple[int, int]
    given: Tensor | None = None

    @property
    def whole(self) -> Tensor:
        """The sample's latent with the frames that were given in front, as they were given: what is decoded."""
        return self.latent if self.given is None else torch.cat([self.given, self.latent], 1)

    @property
    def version(self) -> int:
        """Oldest weight version that took part: the one a group records."""
        return self.versions[0]


@dataclass(frozen=True, eq=False)
class Failure:
    """A sample that could not be finished, and why. Its group mates go on."""

    request: SampleRequest
    member: int
    reason: str


class SamplingFailed(Exception):
    """Some samples could not be finished.

    Attributes:
        failures: which, and why.
        trajectories: what did finish.
    """

    def __init__(self, failures: list[Failure], trajectories: list[Trajectory]) -> None:
        self.failures, self.trajectories = failures, trajectories
        first = failures[0]
        super().__init__(
            f"{len(failures)} of {len(failures) + len(trajectories)} samples failed; member {first.member} of group {first.request.group}: {first.reason}"
        )
