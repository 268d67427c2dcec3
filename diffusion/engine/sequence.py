"""State of one chain of denoising steps between two steps."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.families.given import GIVEN
from diffusion.kernels import Previous, StepKernel
from diffusion.seeds import INITIAL, step_noise


@dataclass(frozen=True, eq=False)
class Path:
    """What sequences of one kernel and step count have in common: the kernel and its time grid."""

    kernel: StepKernel
    times: Tensor


@dataclass(frozen=True, eq=False)
class Context:
    """What the members of one request have in common."""

    request: SampleRequest
    path: Path
    conditioning: Conditioning
    negative: Conditioning | None
    tokens: int


@dataclass(eq=False)
class Sequence:
    """One member of a request; or its *trunk*, the steps that all members share, which ends where they branch.

    Attributes:
        members: members that this chain is for; more than one for a trunk.
        x: state, fp32.
        x0: prediction of x0 in the step before, for kernels that use it; else None.
        index: next step.
        versions: oldest and newest weight version of the steps so far.
    """

    context: Context
    members: range
    x: Tensor
    x0: Tensor | None
    index: int = 0
    versions: tuple[int, int] | None = None
    _kept: list[tuple[Tensor, Tensor, Tensor, Tensor | None]] = field(default_factory=list)
    _stored: Tensor | None = None  # x as it is stored, where the step before kept it

    @classmethod
    def start(cls, context: Context, members: range, device: torch.device) -> Sequence:
        """At step 0, from its starting noise."""
        request, kernel = context.request, context.path.kernel
        noise = step_noise(request.seed, request.group, 0 if request.same_start else members[0], INITIAL, request.shape)
        x = kernel.start(noise).to(getattr(torch, request.state_dtype)).float().to(device)
        return cls(context, members, x, torch.zeros_like(x) if kernel.uses_previous else None)

    @property
    def end(self) -> int:
        """Index at which this chain is done."""
        request = self.context.request
        return request.shared_steps if len(self.members) > 1 else request.steps

    @property
    def stochastic(self) -> bool:
        """Whether the next step draws noise."""
        return self.index in self.context.request.stochastic

    def noise(self) -> Tensor:
        """Noise of the next step, on the CPU."""
        request = self.context.request
        return step_noise(request.seed, request.group, self.members[0], self.index, request.shape)

    def advance(self, x: Tensor, x0: Tensor | None, log_prob: Tensor | None, version: int) -> None:
        """Take a step to state `x`. `x0` is the step's prediction, `log_prob` the density of a stochastic step. What is stored leaves the
        accelerator, in the type that it is stored in."""
        stored = None
        if log_prob is not None and self.index in self.context.request.trained:
            before = self._on_host(self.x) if self._stored is None else self._stored
            stored = self._on_host(x)
            self._kept.append((before, stored, log_prob, None if self.x0 is None else self._on_host(self.x0)))
        self._stored = stored
        self.x, self.x0 = x, x0
        oldest, newest = self.versions or (version, version)
        self.versions = min(oldest, version), max(newest, version)
        self.index += 1

    def _on_host(self, state: Tensor) -> Tensor:
        return state.to("cpu", getattr(torch, self.context.request.state_dtype))

    def branch(self) -> list[Sequence]:
        """The members, each going on from this state."""
        return [replace(self, members=range(m, m + 1), _kept=[]) for m in self.members]

    def trajectory(self) -> Trajectory:
        """The finished sample."""
        assert self.versions is not None  # at least one step was taken
        x, x_next, density, previous = ([kept[i] for kept in self._kept] for i in range(4))
        request, path = self.context.request, self.context.path
        uses, given = path.kernel.uses_previous, self.context.conditioning.tensors.get(GIVEN)
        return Trajectory(
            request=request,
            member=self.members[0],
            latent=self.x.cpu(),
            x=_stack(x),
            x_next=_stack(x_next),
            log_prob=_stack(density),
            times=path.times,
            previous=_stack(previous) if uses else None,
            versions=self.versions,
            given=None if given is None else given.float().cpu(),
        )


def _stack(tensors: list[Tensor | None]) -> Tensor:
    there = [t for t in tensors if t is not None]
    return torch.stack(there).cpu() if there else torch.zeros(0)


def as_stored(values: Tensor, sequences: list[Sequence]) -> Tensor:
    """`values` `[B, …]` at the end of a step, rounded to the type that each request stores; a last state, the sample, stays as it is."""
    requests = [s.context.request for s in sequences]
    rounded = [i for i, (s, r) in enumerate(zip(sequences, requests, strict=True)) if r.state_dtype != "float32" and s.index + 1 < r.steps]
    if not rounded:
        return values
    values = values.clone()
    for i in rounded:
        values[i] = values[i].to(getattr(torch, requests[i].state_dtype)).float()
    return values


def previous_of(sequences: list[Sequence]) -> Previous | None:
    """What a two-step kernel knows of the step before, `[B]`; None for kernels that use nothing of it."""
    if not sequences[0].context.path.kernel.uses_previous:
        return None
    before = [float(s.context.path.times[s.index - 1]) if s.index else math.inf for s in sequences]
    x0 = torch.stack([s.x0 for s in sequences if s.x0 is not None])
    return Previous(x0, torch.tensor(before, device=x0.device))
