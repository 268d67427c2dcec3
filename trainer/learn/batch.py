"""From a claim to one rank's training rows: read what is the rank's, attach advantages, noise the anchor data, encode the texts.

A rank reads the heads of the groups it has members of, those members, and the rows of the data batch that it evaluates. Payloads
carry texts; each different one is encoded once, and rows point at it.

All randomness is named by (run seed, step), drawn whole and then sliced, so the numbers do not depend on the number of
ranks, and a step that is trained again after a crash sees the same noise.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from actors.groups import trained_steps
from actors.payload import DataPayload, GroupPayload, PayloadError, count_of, decode_data, decode_group
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import StepKernel
from diffusion.processes import ForwardProcess
from diffusion.seeds import INITIAL, generator, step_noise
from replay.buffer import Claim, ReplayBuffer
from replay.records import ClaimedGroup, GroupHeader
from trainer.config.run import RunConfig
from trainer.learn.advantages import GroupScores, Term, advantages_of
from trainer.learn.objective import Anchors, Transitions
from trainer.learn.plan import members, share

Rows = TypeVar("Rows", Transitions, Anchors)


@dataclass(frozen=True)
class StepBatch:
    """One rank's rows of an update, the conditioning `[U, …]` (CPU) of their different texts, and the global counts that normalise
    the losses."""

    conditioning: Conditioning
    transitions: Transitions | None
    anchors: Anchors | None
    transition_count: int
    anchor_count: int
    transition_rows: list[int]
    anchor_rows: list[int]

    def conditioning_of(self, rows: Transitions | Anchors) -> Conditioning:
        """What each of `rows` is conditioned on, `[M, …]`, on their device."""
        return self.conditioning.rows(rows.text.cpu()).to(rows.text.device)


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


def transitions_of(payload: GroupPayload, advantages: list[float], kernel: StepKernel, text: int = 0) -> Transitions:
    """Rows of one group, member-major; `text`: place of its prompt among the conditioning.

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
        text=torch.full((n * k,), text),
        previous=payload.previous.flatten(0, 1) if history and payload.previous is not None else None,
        t_previous=before.repeat(n) if history else None,
    )


def _cat(parts: list[Transitions]) -> Transitions:
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Transitions)}
    joined: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return Transitions(**joined)


def _own_data(config: RunConfig, groups: list[int], payloads: dict[int, GroupPayload], rows: range) -> DataPayload:
    """Rows of the data in which each group's own example is the datum of every one of its rollouts; `payloads` (by place of the
    group) has those that the rows are of. A share of the captions is dropped, named by (seed, group, member).

    Raises:
        PayloadError: a group without its own datum.
    """
    n, dropout = config.rollout.group_size, config.data.caption_dropout
    x0, texts = list[Tensor](), list[str]()
    for i, own in members([n] * len(groups), rows).items():
        payload = payloads[i]
        if payload.x0 is None:
            raise PayloadError("a group was made without its own anchor datum, which data.pairing=own needs; it was made by another recipe")
        dropped = (torch.rand(n, generator=generator(config.seed, "caption-dropout", groups[i])) < dropout).tolist()
        x0 += [payload.x0] * len(own)
        texts += ["" if dropped[member] else payload.text for member in own]
    return DataPayload(tuple(texts), torch.stack(x0))


def _rows_of(part: range, repeats: int) -> range:
    """The data rows of a stretch of evaluations, of which each row has `repeats`."""
    return range(part.start // repeats, -(-part.stop // repeats))


def _anchor_rows(
    config: RunConfig,
    process: ForwardProcess,
    step: int,
    data: DataPayload,
    texts: list[int],
    part: range,
    total: int,
    times: Tensor | None,
    groups: list[int],
) -> Anchors:
    """A rank's anchor evaluations. What is drawn is drawn for all `total` evaluations of the update.

    Args:
        data: the rows that the evaluations `part` are of, and no others.
        texts: places of their captions among the conditioning.
        times: `[G, K]` times of the trained steps of each claimed group, in the policy's own process; None without rollouts.
        groups: claimed group indices, for shared noise.
    """
    objective, rollout = config.objective, config.rollout
    repeats = times.shape[1] if times is not None and objective.data_per == "transition" else 1
    rows = _rows_of(part, repeats)
    index = torch.arange(part.start, part.stop) // repeats - rows.start
    shape, n = tuple(data.x0.shape[1:]), rollout.group_size
    if objective.data_noise == "shared":
        assert times is not None  # the configuration refuses shared noise without rollouts
        noise = torch.stack([step_noise(config.seed, groups[row // n], 0 if rollout.same_initial_noise else row % n, INITIAL, shape) for row in rows])
        per_rollout = times.repeat_interleave(n, 0)
        if repeats == 1:
            column = torch.randint(times.shape[1], (len(per_rollout), 1), generator=generator(config.seed, "shared-time", step))
            per_rollout = per_rollout.gather(1, column)
        eps, t = noise[index], per_rollout.flatten()[part.start : part.stop]
    else:
        g = generator(config.seed, "data-noise", step)
        eps = torch.randn((total, *shape), generator=g)[part.start : part.stop]
        t = process.sample_times(total, g)[part.start : part.stop]
    return Anchors(data.x0[index], eps, t, torch.ones(len(part)), torch.tensor(texts)[index])


def _read_group(buffer: ReplayBuffer, item: ClaimedGroup, own: range) -> GroupPayload:
    """A group's head and these of its members."""
    segments = buffer.read(item, [0, *(1 + member for member in own)])
    if count_of(segments[0]) != item.header.size:
        raise PayloadError(f"group {item.group} has {count_of(segments[0])} members, its header says {item.header.size}")
    return decode_group(segments)


def step_batch(
    config: RunConfig,
    process: ForwardProcess,
    kernel: StepKernel,
    buffer: ReplayBuffer,
    claim: Claim,
    rank: int,
    world: int,
    encode: Callable[[list[str]], Conditioning],
) -> StepBatch:
    """One rank's rows of `claim`. Ranks read only their own members, and the rows of the data batch that are theirs.

    Args:
        process, kernel: the policy's process and the step kernel of its rollouts.
        encode: conditioning `[B, …]` of texts.
    Raises:
        PayloadError: bytes that are no group or data batch, or a group that this run's kernel did not sample.
        ValueError, EncoderUnavailable: what `encode` raises.
    """
    objective, groups = config.objective, [g.group for g in claim.groups]
    scores = [scores_of(g.header) for g in claim.groups]
    transitions, times, rows, payloads = None, None, list[int](), dict[int, GroupPayload]()
    own_data = config.uses_data and not config.feeds_data
    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    if claim.groups:
        o = objective
        advantages = advantages_of(scores, terms_of(config), o.advantages, o.failed_reward, o.advantage_scale, o.advantage_clip, o.exponential_advantage)
        sizes = [len(a) for a in advantages]
        mine = members(sizes, share(sum(sizes), rank, world))
        payloads = {i: _read_group(buffer, claim.groups[i], own) for i, own in mine.items()}
        transitions = _cat([transitions_of(p, [advantages[i][m] for m in mine[i]], kernel, place(p.text)) for i, p in payloads.items()])
        k = next(iter(payloads.values())).log_prob.shape[1]
        rows = [len(share(sum(sizes), r, world)) * k for r in range(world)]
        if (claim.data or own_data) and (objective.data_noise == "shared" or objective.data_per == "transition"):
            times = _all_times(config, process, kernel, groups)
    anchors, anchor_rows, total = None, list[int](), 0
    repeats = times.shape[1] if times is not None and objective.data_per == "transition" else 1
    if own_data:
        total = len(groups) * config.rollout.group_size * repeats
        part = share(total, rank, world)
        theirs = members([config.rollout.group_size] * len(groups), _rows_of(part, repeats))
        payloads |= {i: _read_group(buffer, claim.groups[i], range(0)) for i in theirs if i not in payloads}
        data = _own_data(config, groups, payloads, _rows_of(part, repeats))
    elif claim.data:
        batch = claim.data[0]
        (head,) = buffer.read(batch, [0])
        total = count_of(head) * repeats
        part = share(total, rank, world)
        own_rows = _rows_of(part, repeats)
        data = decode_data([head, *buffer.read(batch, [1 + row for row in own_rows])], own_rows)
    if total:
        anchors = _anchor_rows(config, process, claim.step, data, [place(text) for text in data.texts], part, total, times, groups)
        anchor_rows = [len(share(total, r, world)) for r in range(world)]
    return StepBatch(encode(list(places)), transitions, anchors, sum(rows), total, rows, anchor_rows)


def _all_times(config: RunConfig, process: ForwardProcess, kernel: StepKernel, groups: list[int]) -> Tensor:
    """Times of the trained steps of each group `[G, K]`: a function of (seed, group), so no payload is needed.

    A kernel in sigma space has sigmas on its grid; the flow time of a sigma is the time that the network is given there.
    """
    grid = kernel.time_grid(config.sampler.steps)
    if kernel.process is not process:
        grid = kernel.process.model_time(grid)
    return torch.stack([grid[list(trained_steps(config.sampler, config.seed, g))] for g in groups])
