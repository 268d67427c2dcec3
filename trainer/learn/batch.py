"""From a claim to one rank's training rows: read what is the rank's, attach advantages, noise the anchor data, ask for conditioning.

A rank reads the heads of the groups it has members of, those members, and the rows of the data batch that it evaluates. What rows are of,
a text and perhaps frames that are given, is encoded once for all that share it, and rows point at it. Groups and rows of data that are given
different numbers of frames differ in the shape of their latents: a batch of its own for each, split among the ranks by itself.

All randomness is named by (run seed, step), drawn whole and then sliced, so the numbers do not depend on the number of
ranks, and a step that is trained again after a crash sees the same noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, TypeVar

import torch
from torch import Tensor

from actors.conditioning import Subject, Subjects
from actors.groups import trained_steps
from actors.payload import GroupPayload, PayloadError, SamplePayload, count_of, decode_data, decode_group, decode_samples
from diffusion.families.conditioning import Conditioning
from diffusion.kernels import StepKernel
from diffusion.processes import ForwardProcess
from diffusion.processes.flow_time import cosmos_times
from diffusion.seeds import INITIAL, generator, step_noise
from replay.buffer import Claim, ReplayBuffer
from replay.records import ClaimedGroup, GroupHeader
from trainer.config.run import RunConfig
from trainer.learn.advantages import GroupScores, Term, advantages_of
from trainer.learn.objective import Anchors, Samples, Transitions
from trainer.learn.plan import cut, members, share

Rows = TypeVar("Rows", Transitions, Samples, Anchors)


@dataclass(frozen=True)
class StepBatch:
    """One rank's rows of an optimiser update that are given equally many frames, the conditioning `[U, …]` (CPU) of their different subjects, and
    the counts over all ranks and all rows of the update that normalise the losses.

    `transitions` are the rows of the policy loss: steps of rollouts, or finished ones noised anew. A rank without such rows has one of weight zero.
    `transition_rows` and `anchor_rows` say how many each rank has; `part` says which of the claim's updates it is.
    """

    conditioning: Conditioning
    transitions: Transitions | Samples | None
    anchors: Anchors | None
    transition_count: int
    anchor_count: int
    transition_rows: list[int]
    anchor_rows: list[int]
    part: int = 0

    def conditioning_of(self, rows: Transitions | Samples | Anchors) -> Conditioning:
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


def _cat(parts: list[Rows]) -> Rows:
    kind = type(parts[0])
    columns = {f.name: [getattr(p, f.name) for p in parts] for f in fields(kind)}
    joined: dict[str, Any] = {name: None if values[0] is None else torch.cat(values) for name, values in columns.items()}
    return kind(**joined)


def noise_rows(total: int, shape: tuple[int, ...], rows: Sequence[int], g: torch.Generator) -> Tensor:
    """These rows, ascending, of `torch.randn((total, *shape), generator=g)`, which leaves `g` as that does; the others are not held."""
    if math.prod(shape) % 16:  # torch draws sixteen values at a time, so that rows of other sizes are not drawn alike one by one
        return torch.randn((total, *shape), generator=g)[list(rows)]
    wanted, kept = set(rows), list[Tensor]()
    for row in range(total):
        drawn = torch.randn(shape, generator=g)
        if row in wanted:
            kept.append(drawn)
    return torch.stack(kept)


def _read_group(buffer: ReplayBuffer, item: ClaimedGroup, own: range, samples: bool) -> GroupPayload | SamplePayload:
    """A group's head and these of its members, of steps or of `samples`."""
    segments = buffer.read(item, [0, *(1 + member for member in own)])
    if count_of(segments[0]) != item.header.size:
        raise PayloadError(f"group {item.group} has {count_of(segments[0])} members, its header says {item.header.size}")
    return decode_samples(segments) if samples else decode_group(segments)


@dataclass(frozen=True)
class _Update:
    """What the rows of an update are made of, see `step_batches`; the rows of `given` alone are those that are given so many frames."""

    config: RunConfig
    process: ForwardProcess
    kernel: StepKernel
    buffer: ReplayBuffer
    claim: Claim
    rank: int
    world: int
    subjects: Subjects
    free_part: Callable[[Tensor, int], Tensor]
    payloads: dict[int, GroupPayload | SamplePayload] = field(default_factory=dict)  # by place of the group, with the members that were read

    @cached_property
    def groups(self) -> list[int]:
        return [group.group for group in self.claim.groups]

    @cached_property
    def group_given(self) -> list[int]:
        """Frames that each group is given."""
        return [self.subjects.given_to_group(group) for group in self.groups]

    @cached_property
    def parts(self) -> list[list[int]]:
        """Places of the groups of each optimiser update: whole groups, whose advantages balance, in an order named by (seed, step)."""
        count = self.config.learner.updates_per_claim
        if count == 1:
            return [list(range(len(self.groups)))]
        order = torch.randperm(len(self.groups), generator=generator(self.config.seed, "updates-of-a-claim", self.claim.step)).tolist()
        return [sorted(order[i] for i in cut(len(order), part, count)) for part in range(count)]

    @property
    def own_data(self) -> bool:
        """Whether each group's own example is the datum of its rollouts."""
        return self.config.uses_data and not self.config.feeds_data

    @cached_property
    def row_given(self) -> list[int]:
        """Frames that each row of data is given."""
        if self.own_data:
            return [given for given in self.group_given for _ in range(self.config.rollout.group_size)]
        if not self.claim.data:
            return []
        return [self.subjects.given_to_row(self.claim.data[0].batch, row) for row in range(count_of(self.data_head))]

    @cached_property
    def data_head(self) -> memoryview:
        """Head of the data batch that was claimed."""
        (head,) = self.buffer.read(self.claim.data[0], [0])
        return head

    @cached_property
    def times(self) -> Tensor | None:
        """Times of the trained steps of each group `[G, K]`, where data or finished rollouts are evaluated at them."""
        objective = self.config.objective
        wanted = self.row_given and (objective.data_noise == "shared" or objective.data_per == "transition")
        wanted = wanted or (objective.on_samples and objective.policy_times == "steps")
        return _all_times(self.config, self.process, self.kernel, self.groups) if self.groups and wanted else None

    @property
    def repeats(self) -> int:
        """Evaluations of each row of data."""
        return self.times.shape[1] if self.times is not None and self.row_given and self.config.objective.data_per == "transition" else 1

    @property
    def evaluations(self) -> int:
        return len(self.row_given) * self.repeats

    def evaluations_of(self, part: Sequence[int]) -> list[int]:
        """Those of the data that goes with these groups, row by row as rollouts do; all of them without rollouts."""
        n, groups = self.config.rollout.group_size, set(part)
        return [e for e in range(self.evaluations) if not self.groups or e // self.repeats // n in groups]

    def read(self, group: int, own: range) -> GroupPayload | SamplePayload:
        """The payload of a group, by its place, with these of its members, and kept."""
        self.payloads[group] = _read_group(self.buffer, self.claim.groups[group], own, self.config.objective.on_samples)
        return self.payloads[group]

    def rows(self, group: int, own: range, advantages: list[float], text: int) -> Transitions | Samples:
        """Rows of the policy loss of members of a group, whose `advantages` are given."""
        payload = self.payloads[group]
        if isinstance(payload, GroupPayload):
            return transitions_of(payload, advantages, self.kernel, text)
        drawn = [self._renoised(group, member, tuple(payload.sample.shape[1:])) for member in own]
        eps, t = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        k = len(t) // len(own)
        repeated = torch.tensor(advantages).repeat_interleave(k)
        return Samples(payload.sample.repeat_interleave(k, 0), eps, t, repeated, torch.ones(len(t)), torch.full((len(t),), text))

    def _renoised(self, group: int, member: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Noise `[K, …]` and times `[K]` of a finished rollout, named by (run seed, step, group, member)."""
        k, g = self.config.sampler.trained_count, generator(self.config.seed, "policy-noise", self.claim.step, self.groups[group], member)
        if self.config.objective.policy_times == "stratified":
            t = self.process.quantiles((torch.arange(k) + torch.rand(k, generator=g)) / k)
        else:
            assert self.times is not None  # of its trained steps
            t = self.times[group]
        return torch.randn((k, *shape), generator=g), t

    def transitions(
        self, part: Sequence[int], given: int, advantages: list[list[float]], place: Callable[[Subject], int]
    ) -> tuple[Transitions | Samples | None, list[int]]:
        """This rank's rows of the policy loss of these groups, and how many each rank has."""
        chosen = [i for i in part if self.group_given[i] == given]
        if not chosen:
            return None, []
        sizes = [len(advantages[i]) for i in chosen]
        cuts = [cut(sum(sizes), rank, self.world) for rank in range(self.world)]
        mine = {chosen[i]: own for i, own in members(sizes, cuts[self.rank] or range(1)).items()}
        parts: list[Any] = []
        for i, own in mine.items():
            payload = self.read(i, own)
            subject = self.subjects.of_group(self.groups[i], payload.text, payload.x0)
            parts.append(self.rows(i, own, [advantages[i][m] for m in own], place(subject)))
        rows, k = _cat(parts), len(parts[0].t) // len(next(iter(mine.values())))
        return (rows if cuts[self.rank] else _weightless(rows)), [len(part) * k for part in cuts]

    def anchors(self, part: Sequence[int], given: int, place: Callable[[Subject], int]) -> tuple[Anchors | None, list[int]]:
        """This rank's evaluations of the data term, and how many each rank has. What is drawn is drawn for all evaluations of the claim."""
        every = [e for e in self.evaluations_of(part) if self.row_given[e // self.repeats] == given]
        if not every:
            return None, []
        cuts = [cut(len(every), rank, self.world) for rank in range(self.world)]
        mine = [every[i] for i in cuts[self.rank] or range(1)]
        rows = list(dict.fromkeys(e // self.repeats for e in mine))
        subjects = dict(zip(rows, self._own(rows) if self.own_data else self._fed(rows), strict=True))
        clean = [subjects[e // self.repeats].x0 for e in mine]
        whole = torch.stack([x0 for x0 in clean if x0 is not None])
        eps, t = self._noise(mine, tuple(whole.shape[1:]), given)
        places = {row: place(subject) for row, subject in subjects.items()}
        text = torch.tensor([places[e // self.repeats] for e in mine])
        found = Anchors(self.free_part(whole, given), eps, t, torch.ones(len(mine)), text)
        return (found if cuts[self.rank] else _weightless(found)), [len(own) for own in cuts]

    def _own(self, rows: Sequence[int]) -> list[Subject]:
        """Subjects of rows of data that are each group's own example, the datum of every one of its rollouts; a share of the captions is
        dropped, named by (seed, group, member). Raises PayloadError for a group without its own datum."""
        n, found = self.config.rollout.group_size, list[Subject]()
        for row in rows:
            i, member = divmod(row, n)
            payload = self.payloads[i] if i in self.payloads else self.read(i, range(0))
            if payload.x0 is None:
                raise PayloadError("a group was made without its own anchor datum, which data.pairing=own needs; it was made by another recipe")
            dropped = torch.rand(n, generator=generator(self.config.seed, "caption-dropout", self.groups[i])) < self.config.data.caption_dropout
            found.append(self.subjects.of_group(self.groups[i], "" if dropped[member] else payload.text, payload.x0))
        return found

    def _fed(self, rows: Sequence[int]) -> list[Subject]:
        """Subjects of rows of the data batch that was claimed."""
        batch = self.claim.data[0]
        data = decode_data([self.data_head, *self.buffer.read(batch, [1 + row for row in rows])], rows)
        return [self.subjects.of_row(batch.batch, row, text, x0) for row, text, x0 in zip(rows, data.texts, data.x0, strict=True)]

    def _noise(self, part: Sequence[int], shape: tuple[int, ...], given: int) -> tuple[Tensor, Tensor]:
        """Noise of the free frames and times of these evaluations of clean latents of this shape."""
        config, n, rows = self.config, self.config.rollout.group_size, [e // self.repeats for e in part]
        if config.objective.data_noise == "shared":
            assert self.times is not None  # the configuration refuses shared noise without rollouts
            free = tuple(self.free_part(torch.empty(shape, device="meta"), given).shape)
            member = [0 if config.rollout.same_initial_noise else row % n for row in rows]
            noise = torch.stack([step_noise(config.seed, self.groups[row // n], m, INITIAL, free) for row, m in zip(rows, member, strict=True)])
            per_rollout = self.times.repeat_interleave(n, 0)
            if config.objective.data_per == "first":
                per_rollout = per_rollout[:, :1]
            elif self.repeats == 1:
                column = torch.randint(per_rollout.shape[1], (len(per_rollout), 1), generator=generator(config.seed, "shared-time", self.claim.step))
                per_rollout = per_rollout.gather(1, column)
            return noise, per_rollout.flatten()[list(part)]
        g = generator(config.seed, "data-noise", self.claim.step)
        noise = noise_rows(self.evaluations, shape, part, g)
        if config.objective.data_times == "cosmos":
            drawn = cosmos_times(self.process, self.evaluations, shape[1] if len(shape) == 4 else 1, g)
        else:
            drawn = self.process.sample_times(self.evaluations, g)
        return self.free_part(noise, given), drawn[list(part)]


def _weightless(rows: Rows) -> Rows:
    return replace(rows, weight=torch.zeros_like(rows.weight))


class _Places:
    """Different subjects of a batch, each once."""

    def __init__(self) -> None:
        self.subjects: list[Subject] = []
        self._places: dict[object, int] = {}

    def __call__(self, subject: Subject) -> int:
        """The place of a subject: of a text alone that of its text, else that of its text and its clip."""
        shown = (subject.example.media, subject.example.latent) if subject.given and subject.example is not None else None
        name = (subject.text, shown)
        if name not in self._places:
            self._places[name] = len(self.subjects)
            self.subjects.append(subject)
        return self._places[name]


def step_batches(
    config: RunConfig,
    process: ForwardProcess,
    kernel: StepKernel,
    buffer: ReplayBuffer,
    claim: Claim,
    rank: int,
    world: int,
    encode: Callable[[list[Subject]], Conditioning],
    subjects: Subjects,
    free_part: Callable[[Tensor, int], Tensor],
) -> list[StepBatch]:
    """One rank's rows of `claim`, by its optimiser updates, a batch for each number of given frames, the same ones on every rank. Ranks read only
    their own members, and the rows of the data batch that are theirs.

    Args:
        process, kernel: the policy's process and the step kernel of its rollouts.
        encode: conditioning `[B, …]` of subjects that are given equally many frames.
        subjects: what groups and rows are of.
        free_part: what of clean latents is sampled (`PackedModel.free_part`).
    Raises:
        PayloadError: bytes that are no group or data batch, or a group that this run's kernel did not sample.
        ValueError: what `encode` raises; or fewer rows than ranks.
        EncoderUnavailable: what `encode` raises.
    """
    update, o = _Update(config, process, kernel, buffer, claim, rank, world, subjects, free_part), config.objective
    advantages: list[list[float]] = []
    if claim.groups:
        scores = [scores_of(g.header) for g in claim.groups]
        advantages = advantages_of(
            scores,
            terms_of(config),
            o.advantages,
            o.failed_reward,
            o.advantage_scale,
            o.advantage_clip,
            o.exponential_advantage,
            biased=o.advantage_std == "biased",
            epsilon=o.advantage_epsilon,
            prompts=[subjects.group(g.group).text for g in claim.groups] if o.advantage_baseline == "prompt" else None,
        )
        if o.advantage_max is not None:
            advantages = [[a * o.advantage_max / o.advantage_clip for a in group] for group in advantages]
    found = list[StepBatch]()
    for number, part in enumerate(update.parts):
        if part:
            share(sum(len(advantages[i]) for i in part), rank, world)
        evaluations = len(update.evaluations_of(part))
        if update.row_given:
            share(evaluations, rank, world)
        made = []
        for given in sorted({*update.group_given, *update.row_given}):
            places = _Places()
            transitions, transition_rows = update.transitions(part, given, advantages, places)
            anchors, anchor_rows = update.anchors(part, given, places)
            if transitions is not None or anchors is not None:
                made.append((places.subjects, transitions, anchors, transition_rows, anchor_rows))
        trained = sum(sum(rows) for _, _, _, rows, _ in made)
        found += [StepBatch(encode(shown), t, a, trained, evaluations, t_rows, a_rows, number) for shown, t, a, t_rows, a_rows in made]
    return found


def _all_times(config: RunConfig, process: ForwardProcess, kernel: StepKernel, groups: list[int]) -> Tensor:
    """Times of the trained steps of each group `[G, K]`: a function of (seed, group), so no payload is needed.

    A kernel in sigma space has sigmas on its grid; the flow time of a sigma is the time that the network is given there.
    """
    grid = kernel.time_grid(config.sampler.steps)
    if kernel.process is not process:
        grid = kernel.process.model_time(grid)
    return torch.stack([grid[list(trained_steps(config.sampler, config.seed, g, config.rollout.groups_per_step))] for g in groups])
