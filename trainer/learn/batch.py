"""From a claim to one rank's training rows: decode payloads, attach advantages, noise the anchor data.

All randomness is named by (run seed, step), drawn whole and then sliced, so the numbers do not depend on the number of
ranks, and a step that is trained again after a crash sees the same noise.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from actors.groups import trained_steps
from actors.payload import DataPayload, GroupPayload, PayloadError, decode_data, decode_group
from diffusion.kernels import StepKernel
from diffusion.processes import ForwardProcess
from diffusion.seeds import INITIAL, generator, step_noise
from replay.buffer import Claim, ReplayBuffer
from replay.records import GroupHeader
from trainer.config.run import RunConfig
from trainer.learn.advantages import GroupScores, Term, advantages_of
from trainer.learn.objective import Anchors, Transitions
from trainer.learn.plan import share

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


def terms_of(config: RunConfig) -> dict[str, Term]:
    """The rewards that `config` trains on, by the name of their term in a group's scores."""
    return {name: Term(term.weight, term.clip) for name, term in config.rewards.items()}


def scores_of(header: GroupHeader) -> GroupScores:
    """Scores of a group's members by term."""
    return header.scores


def take(rows: Rows, part: slice, device: torch.device | str = "cpu") -> Rows:
    """A micro-batch of `rows` on `device`; an empty slice gives one row of weight zero."""
    empty = part.stop <= part.start
    given: dict[str, Any] = {f.name: getattr(rows, f.name) for f in fields(rows)}
    chosen = slice(0, 1) if empty else part
    parts: dict[str, Any] = {name: None if value is None else value[chosen].to(device) for name, value in given.items()}
    taken = type(rows)(**parts)
    return replace(taken, weight=torch.zeros(1, device=device)) if empty else taken


def transitions_of(payload: GroupPayload, advantages: list[float], kernel: StepKernel) -> Transitions:
    """Rows of one group, member-major.

    Raises PayloadError when the group was sampled on another time grid or by another kind of kernel than this run's.
    """
    n, k = payload.log_prob.shape
    times, step = payload.times, payload.trained
    if times.shape != (kernel.steps + 1,) or not torch.allclose(times, kernel.time_grid(kernel.steps), rtol=1e-6, atol=0):
        raise PayloadError(
            f"a group was sampled on another time grid than {kernel.name}'s of {kernel.steps} steps; sampler and learner differ in settings or build"
        )
    if kernel.uses_previous and payload.previous is None:
        raise PayloadError(f"a group holds no predictions of the step before, which {kernel.name} needs; it was sampled by another kernel")
    t, t_next = times[step].repeat(n), times[step + 1].repeat(n)
    before = torch.where(step > 0, times[(step - 1).clamp_min(0)], torch.full((k,), torch.inf))
    history = kernel.uses_previous and payload.previous is not None
    return Transitions(
        x=payload.x.flatten(0, 1),
        x_next=payload.x_next.flatten(0, 1),
        t=t,
        t_next=t_next,
        step=step.repeat(n),
        old_log_prob=payload.log_prob.flatten(),
        advantage=torch.tensor(advantages).repeat_interleave(k),
        weight=torch.ones(n * k),
        prompt_embeds=payload.prompt_embeds[None].expand(n * k, -1, -1),
        pooled=payload.pooled[None].expand(n * k, -1),
        previous=payload.previous.flatten(0, 1) if history and payload.previous is not None else None,
        t_previous=before.repeat(n) if history else None,
    )


def _cat(parts: list[Transitions]) -> Transitions:
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Transitions)}
    joined: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return Transitions(**joined)


def _own_data(config: RunConfig, groups: list[int], payloads: dict[int, GroupPayload]) -> DataPayload:
    """Each group's own example as the datum of every one of its rollouts; rows of groups that are not in `payloads` (those of
    other ranks) are empty. A share of the captions is dropped, named by (seed, group, member).

    Raises:
        PayloadError: a group without its own datum.
    """
    n, dropout = config.rollout.group_size, config.data.caption_dropout
    some = next(iter(payloads.values()))
    if any(p.x0 is None or (dropout > 0 and p.empty_embeds is None) for p in payloads.values()) or some.x0 is None:
        raise PayloadError("a group was made without its own anchor datum, which data.pairing=own needs; it was made by another recipe")
    x0 = torch.zeros(len(groups) * n, *some.x0.shape)
    embeds = torch.zeros(len(groups) * n, *some.prompt_embeds.shape)
    pooled = torch.zeros(len(groups) * n, *some.pooled.shape)
    for i, payload in payloads.items():
        assert payload.x0 is not None
        x0[i * n : (i + 1) * n] = payload.x0
        embeds[i * n : (i + 1) * n], pooled[i * n : (i + 1) * n] = payload.prompt_embeds, payload.pooled
        dropped = torch.rand(n, generator=generator(config.seed, "caption-dropout", groups[i])) < dropout
        if payload.empty_embeds is not None and payload.empty_pooled is not None:
            embeds[i * n : (i + 1) * n][dropped] = payload.empty_embeds
            pooled[i * n : (i + 1) * n][dropped] = payload.empty_pooled
    return DataPayload(x0, embeds, pooled)


def _anchor_rows(config: RunConfig, process: ForwardProcess, step: int, data: DataPayload, times: Tensor | None, groups: list[int]) -> Anchors:
    """All anchor evaluations of an update (of every rank).

    Args:
        times: `[G, K]` times of the trained steps of each claimed group, in the policy's own process; None without rollouts.
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


def step_batch(config: RunConfig, process: ForwardProcess, kernel: StepKernel, buffer: ReplayBuffer, claim: Claim, rank: int, world: int) -> StepBatch:
    """One rank's rows of `claim`. Ranks fetch only their own groups; the anchor batch is read by all and sliced.

    Args:
        process, kernel: the policy's process and the step kernel of its rollouts.
    Raises:
        PayloadError: bytes that are no group or data batch, or a group that this run's kernel did not sample.
    """
    objective = config.objective
    scores = [scores_of(g.header) for g in claim.groups]
    transitions, times, rows = None, None, []
    own, payloads = config.uses_data and not config.feeds_data, dict[int, GroupPayload]()
    if claim.groups:
        o = objective
        advantages = advantages_of(scores, terms_of(config), o.advantages, o.failed_reward, o.advantage_scale, o.advantage_clip, o.exponential_advantage)
        mine = share(len(claim.groups), rank, world)
        payloads = {i: decode_group(buffer.fetch(claim.groups[i])) for i in mine}
        transitions = _cat([transitions_of(p, advantages[i], kernel) for i, p in payloads.items()])
        k = next(iter(payloads.values())).log_prob.shape[1]
        rows = [sum(len(advantages[i]) * k for i in share(len(advantages), r, world)) for r in range(world)]
        if (claim.data or own) and (objective.data_noise == "shared" or objective.data_per == "transition"):
            times = _all_times(config, process, kernel, [g.group for g in claim.groups])
    anchors, anchor_rows, total = None, [], 0
    if own:
        data = _own_data(config, [g.group for g in claim.groups], payloads)
        everything = _anchor_rows(config, process, claim.step, data, times, [g.group for g in claim.groups])
        total = len(everything.x0)
        each = total // len(claim.groups)
        anchor_rows = [len(share(len(claim.groups), r, world)) * each for r in range(world)]
        ours = torch.cat([torch.arange(i * each, (i + 1) * each) for i in payloads])
        anchors = Anchors(**{f.name: getattr(everything, f.name)[ours] for f in fields(Anchors)})
    elif claim.data:
        data = decode_data(buffer.fetch(claim.data[0]))
        everything = _anchor_rows(config, process, claim.step, data, times, [g.group for g in claim.groups])
        total = len(everything.x0)
        mine = share(total, rank, world)
        anchors = Anchors(**{f.name: getattr(everything, f.name)[mine] for f in fields(Anchors)})
        anchor_rows = [len(share(total, r, world)) for r in range(world)]
    return StepBatch(transitions, anchors, sum(rows), total, rows, anchor_rows)


def _all_times(config: RunConfig, process: ForwardProcess, kernel: StepKernel, groups: list[int]) -> Tensor:
    """Times of the trained steps of each group `[G, K]`: a function of (seed, group), so no payload is needed.

    A kernel in sigma space has sigmas on its grid; the flow time of a sigma is the time that the network is given there.
    """
    grid = kernel.time_grid(config.sampler.steps)
    if kernel.process is not process:
        grid = kernel.process.model_time(grid)
    return torch.stack([grid[list(trained_steps(config.sampler, config.seed, g))] for g in groups])
