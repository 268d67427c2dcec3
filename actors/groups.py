"""What a group is made of: its request, its payload, and what its members' scores come to. Pure functions of settings and names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from torch import Tensor

from actors.config import RolloutConfig
from actors.members import GroupMembers, SampleMembers
from diffusion.config import SamplerConfig
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.kernel_names import stochastic_steps
from diffusion.seeds import key
from services.contract import ItemScore, ScoreFailure
from services.terms import Term

Scores = Mapping[str, Sequence[ItemScore | ScoreFailure]]
"""What each reward says of each member."""


class ScoringFailed(Exception):
    """Too few members of a group have a score; the message says which have none and why."""


@dataclass(frozen=True)
class Weighted:
    """A term that is trained: its value, cut to `clip`, times `weight`, is part of the total."""

    term: Term
    weight: float
    clip: tuple[float, float] | None = None

    def part(self, value: float) -> float:
        """Its part of the total."""
        low, high = self.clip or (value, value)
        return self.weight * max(low, min(high, value))


@dataclass(frozen=True)
class Judged:
    """The scores of a group.

    Attributes:
        members: indices of those that are trained, ascending.
        values: each term's value by member; None where that reward failed.
        totals: weighted sum of the terms by member.
        failures: scores that are missing, over all members and terms.
    """

    members: list[int]
    values: dict[str, list[float | None]]
    totals: list[float]
    failures: int


def judge(scores: Scores, terms: Sequence[Weighted], size: int, enough: int, fill: bool) -> Judged:
    """The members that are trained, and their numbers. A score that is missing is never given a number of its own making.

    Without `fill` a member that lacks any term is left out of the group, which is normalised by the statistics of those that
    are left. With `fill` it stays: in the total, a term that failed counts as the mean of the group's other members (public
    DDRL code), and `values` keeps the gap.

    Raises:
        ScoringFailed: fewer than `enough` members have a score (with `fill`: of any one term).
    """
    table = {w.term.name: [_value(w.term, score) for score in scores[w.term.reward]] for w in terms}
    missing = sum(value is None for values in table.values() for value in values)
    members = [m for m in range(size) if fill or all(values[m] is not None for values in table.values())]
    least = min((sum(v is not None for v in values) for values in table.values()), default=0) if fill else len(members)
    if least < enough:
        raise ScoringFailed(f"{least} of {size} members have a reward, {enough} are needed; " + "; ".join(_reasons(scores, terms)[:3]))
    means = {name: fmean([v for v in values if v is not None]) for name, values in table.items()}

    def total(member: int) -> float:
        given = ((w, table[w.term.name][member]) for w in terms)
        return sum(w.part(means[w.term.name] if value is None else value) for w, value in given)

    values = {name: [column[m] for m in members] for name, column in table.items()}
    return Judged(members, values, [total(m) for m in members], missing)


def _value(term: Term, score: ItemScore | ScoreFailure) -> float | None:
    return term.value(score) if isinstance(score, ItemScore) else None


def _reasons(scores: Scores, terms: Sequence[Weighted]) -> list[str]:
    names = dict.fromkeys(w.term.reward for w in terms)
    return [f"member {m}: {name}: {s.code}: {s.message}" for name in names for m, s in enumerate(scores[name]) if not isinstance(s, ItemScore)]


def trained_steps(sampler: SamplerConfig, seed: int, group: int, groups_per_step: int = 1) -> tuple[int, ...]:
    """Trained step indices of a group, ascending: one choice per group, so that its members stay comparable. A window slides by the number of the
    group, `groups_per_step` of which make an update; it is never cut short at the end."""
    if isinstance(sampler.trained_steps, list):
        return tuple(sorted(sampler.trained_steps))
    rng, n = np.random.default_rng(key(seed, "trained", group)), sampler.trained_steps
    last = stochastic_steps(sampler.kernel, sampler.steps) - n
    if sampler.trained_choice == "scattered":
        return tuple(sorted(int(i) for i in rng.choice(last + n, n, replace=False)))
    if sampler.trained_choice == "window":
        wanted = sampler.steps // 2 if sampler.window_last is None else sampler.window_last
        first = int(rng.integers(min(wanted, last) + 1))
    else:
        first = group // (groups_per_step * sampler.window_updates) % (last + 1)
    return tuple(range(first, first + n))


def group_request(
    sampler: SamplerConfig,
    rollout: RolloutConfig,
    seed: int,
    group: int,
    text: Conditioning,
    negative: Conditioning | None,
    shape: tuple[int, ...],
    store_dtype: str = "float32",
    samples: bool = False,
) -> SampleRequest:
    """The request for all members of one group. `negative`: the encoded negative prompt, with guidance; `store_dtype`: type that
    its states are stored in; `samples`: nothing of a rollout is stored but the sample itself."""
    chosen = trained_steps(sampler, seed, group, rollout.groups_per_step)
    trained = () if samples else chosen
    stochastic = {"all": range(stochastic_steps(sampler.kernel, sampler.steps)), "trained": chosen, "none": ()}[sampler.noise_on]
    return SampleRequest(
        shape=shape,
        steps=sampler.steps,
        conditioning=text,
        n=rollout.group_size,
        seed=seed,
        group=group,
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        stochastic=frozenset(stochastic),
        trained=trained,
        same_start=rollout.same_initial_noise,
        guidance=sampler.guidance,
        negative=negative,
        state_dtype=store_dtype,
        id=group,
    )


def fps_of(samples: np.ndarray, sampler: SamplerConfig) -> float | None:
    """What rewards are told of samples' frames a second: nothing of pictures `[n, H, W, 3]`."""
    return sampler.fps if samples.ndim == 5 else None


def group_payload(trajectories: Sequence[Trajectory], text: str, x0: Tensor | None = None) -> GroupMembers | SampleMembers:
    """What is stored of a group: its trained transitions, or where it has none its samples.

    `x0`: clean latent `[C, h, w]` of the group's own example, where that is its anchor datum."""
    first = trajectories[0]
    if not first.request.trained:
        return SampleMembers(text, [t.latent for t in trajectories], first.times, None if x0 is None else x0.cpu())
    return GroupMembers(text, trajectories, torch.tensor(first.request.trained), first.times, None if x0 is None else x0.cpu())
