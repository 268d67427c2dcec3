"""Transitions of a step kernel, and what an objective of ours makes of them, to be held against public code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion.kernels import Previous, StepKernel, log_prob
from trainer.config.objective import ObjectiveConfig
from trainer.learn.objective import Transitions, density, policy_terms

SHAPE = (4, 6, 8)


@dataclass(frozen=True)
class Case:
    """One transition of each of `steps`: `now`, `old` and `reference` are what the network says at `x` under the current, the sampling and the
    starting weights."""

    kernel: StepKernel
    grid: Tensor
    steps: tuple[int, ...]
    x: Tensor
    x_next: Tensor
    now: Tensor
    old: Tensor
    reference: Tensor
    previous: Tensor
    advantages: Tensor


def case(kernel: StepKernel, steps: Sequence[int], moved: float, seed: int = 0) -> Case:
    """Transitions sampled by `old`; `now` is `moved` away from it, `reference` three times as far."""
    g = torch.Generator().manual_seed(seed)
    rows, index, grid = len(steps), torch.tensor(steps), kernel.time_grid(kernel.steps)
    x, old, noise, previous, away, other = torch.randn(6, rows, *SHAPE, generator=g)
    x = x * kernel.process.coefficients(grid[index])[1].reshape(-1, 1, 1, 1).clamp_min(0.5)
    mean, std = kernel.moments(old.double(), x.double(), grid[index], grid[index + 1], _history(grid, index, previous))
    return Case(
        kernel=kernel,
        grid=grid,
        steps=tuple(steps),
        x=x,
        x_next=(mean + std.double().reshape(-1, 1, 1, 1) * noise).float(),
        now=old + moved * away,
        old=old,
        reference=old + 3 * moved * other,
        previous=previous,
        advantages=torch.tensor([1.5, -0.7, 0.2, -2.0, 0.9, -0.1, 3.0, -1.1, 0.4, 2.2])[:rows],
    )


def _history(grid: Tensor, index: Tensor, previous: Tensor) -> Previous:
    first = (index > 0).reshape(-1, 1, 1, 1)
    return Previous(previous * first, torch.where(index > 0, grid[(index - 1).clamp_min(0)], torch.inf))


def ours(c: Case, config: ObjectiveConfig) -> tuple[Tensor, Tensor]:
    """Loss of `policy_terms`, mean over the transitions, and its gradient in the network's output; fp32 as in a run."""
    index = torch.tensor(c.steps)
    t, t_next, history = c.grid[index], c.grid[index + 1], _history(c.grid, index, c.previous)
    mean, std = c.kernel.moments(c.old.double(), c.x.double(), t, t_next, history)
    rows = Transitions(
        x=c.x,
        x_next=c.x_next,
        t=t,
        t_next=t_next,
        step=index,
        old_log_prob=log_prob(c.x_next, mean, std),
        advantage=c.advantages,
        weight=torch.ones(len(index)),
        text=torch.zeros(len(index), dtype=torch.int64),
        previous=history.x0 if c.kernel.uses_previous else None,
        t_previous=history.t if c.kernel.uses_previous else None,
    )
    if config.old_log_prob == "learner":
        rows = replace(rows, **density(c.old, rows, c.kernel, config))
    velocity = c.now.clone().requires_grad_()
    loss, _ = policy_terms(velocity, c.reference if config.kl_weight > 0 else None, rows, c.kernel, config)
    loss = loss / len(index)
    (gradient,) = torch.autograd.grad(loss, velocity)
    return loss.detach(), gradient
