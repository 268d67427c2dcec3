"""From a claim to one rank's training rows: decode payloads, attach advantages, noise the anchor data.

All randomness is named by (run seed, step), drawn whole and then sliced, so the numbers do not depend on the number of
ranks, and a step that is trained again after a crash sees the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TypeVar

import torch
from torch import Tensor

from actors.payload import DataPayload, GroupPayload, decode_data, decode_group
from actors.rollout import trained_steps
from diffusion.processes import ForwardProcess
from diffusion.seeds import INITIAL, generator, step_noise
from replay.buffer import Claim, ReplayBuffer
from trainer.advantages import group_advantages, zero_variance
from trainer.config import RunConfig
from trainer.objective import Anchors, Transitions
from trainer.plan import share

Rows = TypeVar("Rows", Transitions, Anchors)


@dataclass(frozen=True)
class StepBatch:
    """One rank's rows of an update, and the global counts that normalise the losses."""

    transitions: Transitions | None
    anchors: Anchors | None
    transition_count: int
    anchor_count: int
    transition_rows: list[int]
    anchor_rows: list[int]
    zero_variance_groups: int


def take(rows: Rows, part: slice, device: torch.device | str = "cpu") -> Rows:
    """A micro-batch of `rows` on `device`; an empty slice gives one row of weight zero."""
    if part.stop > part.start:
        return type(rows)(**{f.name: getattr(rows, f.name)[part].to(device) for f in fields(rows)})
    first = type(rows)(**{f.name: getattr(rows, f.name)[:1].to(device) for f in fields(rows)})
    return replace(first, weight=torch.zeros(1, device=device))


def _transitions(payload: GroupPayload, advantages: list[float]) -> Transitions:
    """Rows of one group, member-major."""
    n, k = payload.log_prob.shape
    times = payload.times
    t, t_next = times[payload.trained].repeat(n), times[payload.trained + 1].repeat(n)
    return Transitions(
        x=payload.x.flatten(0, 1),
        x_next=payload.x_next.flatten(0, 1),
        t=t,
        t_next=t_next,
        old_log_prob=payload.log_prob.flatten(),
        advantage=torch.tensor(advantages).repeat_interleave(k),
        weight=torch.ones(n * k),
        prompt_embeds=payload.prompt_embeds[None].expand(n * k, -1, -1),
        pooled=payload.pooled[None].expand(n * k, -1),
    )


def _cat(parts: list[Transitions]) -> Transitions:
    return Transitions(**{f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(Transitions)})


def _anchor_rows(config: RunConfig, process: ForwardProcess, step: int, data: DataPayload, times: Tensor | None, groups: list[int]) -> Anchors:
    """All anchor evaluations of an update (of every rank).

    Args:
        times: `[G, K]` times of the trained steps of each claimed group; None without rollouts.
        groups: claimed group indices, for shared noise.
    """
    objective, rollout = config.objective, config.rollout
    repeats = times.shape[1] if times is not None and objective.data_per == "transition" else 1
    index = torch.arange(len(data.x0)).repeat_interleave(repeats)
    x0 = data.x0[index]
    if objective.data_noise == "shared":
        assert times is not None  # the configuration refuses shared noise without rollouts
        shape = tuple(data.x0.shape[1:])
        members = [0 if rollout.same_initial_noise else m for m in range(rollout.group_size)]
        noise = torch.stack([step_noise(config.seed, g, m, INITIAL, shape) for g in groups for m in members])
        per_rollout = times.repeat_interleave(rollout.group_size, 0)
        if repeats == 1:
            column = torch.randint(times.shape[1], (len(per_rollout), 1), generator=generator(config.seed, "shared-time", step))
            per_rollout = per_rollout.gather(1, column)
        eps, t = noise[index], per_rollout.flatten()
    else:
        g = generator(config.seed, "data-noise", step)
        eps = torch.randn(x0.shape, generator=g)
        t = process.sample_times(len(x0), g)
    return Anchors(x0, eps, t, torch.ones(len(x0)), data.prompt_embeds[index], data.pooled[index])


def step_batch(config: RunConfig, process: ForwardProcess, buffer: ReplayBuffer, claim: Claim, rank: int, world: int) -> StepBatch:
    """One rank's rows of `claim`. Ranks fetch only their own groups; the anchor batch is read by all and sliced."""
    objective = config.objective
    rewards = [g.header.rewards for g in claim.groups]
    transitions, times, rows = None, None, []
    if claim.groups:
        advantages = group_advantages(rewards, objective.advantage_scale, objective.advantage_clip, objective.exponential_advantage)
        mine = share(len(claim.groups), rank, world)
        payloads = {i: decode_group(buffer.fetch(claim.groups[i])) for i in mine}
        transitions = _cat([_transitions(p, advantages[i]) for i, p in payloads.items()])
        k = next(iter(payloads.values())).log_prob.shape[1]
        rows = [sum(len(rewards[i]) * k for i in share(len(rewards), r, world)) for r in range(world)]
        if claim.data and (objective.data_noise == "shared" or objective.data_per == "transition"):
            times = _all_times(config, process, [g.group for g in claim.groups])
    anchors, anchor_rows, total = None, [], 0
    if claim.data:
        data = decode_data(buffer.fetch(claim.data[0]))
        everything = _anchor_rows(config, process, claim.step, data, times, [g.group for g in claim.groups])
        total = len(everything.x0)
        mine = share(total, rank, world)
        anchors = Anchors(**{f.name: getattr(everything, f.name)[mine] for f in fields(Anchors)})
        anchor_rows = [len(share(total, r, world)) for r in range(world)]
    return StepBatch(transitions, anchors, sum(rows), total, rows, anchor_rows, zero_variance(rewards))


def _all_times(config: RunConfig, process: ForwardProcess, groups: list[int]) -> Tensor:
    """Times of the trained steps of each group `[G, K]`: a function of (seed, group), so no payload is needed."""
    grid = process.time_grid(config.sampler.steps)
    return torch.stack([grid[list(trained_steps(config.sampler, config.seed, g))] for g in groups])
