"""Group-normalised advantages of one or several rewards. Pure Python on lists: no torch.

A_n = (r_n - mean of the group) / (std + epsilon), clipped to ±5 (public DDRL code; Flow-GRPO and DanceGRPO clip alike).
The standard deviation is the group's own or that of all rewards of the update (Flow-GRPO on SD3.5), over n - 1 or over n; groups with the same
prompt may be one group (Flow-GRPO). A group of one has no standard deviation over n - 1: A = r (public DDRL code).

Several rewards (terms), each clamped to its own bounds first, become one advantage in one of three ways:

    each   every term is normalised by itself; A = sum w A_term / sum |w|: the mean over reward models of the public DDRL
           code when the weights are equal
    added  the same without the division: A = sum w A_term (MixGRPO)
    sum    R = sum w r_term is normalised once

With one reward of weight 1 both are the formula above. The exponential map and the clip are applied once, at the end.

A worked example: a group with ocr [0, 1] and sharpness [30, 10], weights 1 and 1. `sum` follows sharpness, which has the
larger numbers: A = [0.7, -0.7]. `each` gives both the same say: A = [0, 0].
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from replay.policy import zero_variance

EPSILON = 1e-4
"""Added to the standard deviation (public DDRL code, Flow-GRPO)."""

GroupScores = Mapping[str, Sequence[float | None]]
"""Scores of one group's members by term; None: the term failed for that member."""


@dataclass(frozen=True)
class Term:
    """One reward that is trained on: its weight, and bounds that scores are clamped to before anything else."""

    weight: float = 1.0
    clip: tuple[float, float] | None = None

    def clamp(self, score: float) -> float:
        """`score` within the bounds."""
        return score if self.clip is None else min(max(score, self.clip[0]), self.clip[1])


def group_advantages(
    groups: Sequence[Sequence[float]],
    scale: str = "group",
    clip: float = 5.0,
    exponential: bool = False,
    *,
    biased: bool = False,
    epsilon: float = EPSILON,
    prompts: Sequence[str] | None = None,
) -> list[list[float]]:
    """Advantages of every member of every group, of one reward.

    Args:
        groups: rewards by group, all finite.
        scale: `group` or `batch`: whose standard deviation divides.
        clip: bound on |A|.
        exponential: map A to -exp(-A) before clipping (the theory's lambda, DDRL §1.2), which restores the exact
            exponential tilt in form.
        biased: the standard deviation of n rewards is over n (Flow-GRPO), else over n - 1.
        epsilon: added to it.
        prompts: of the groups: those of one prompt are one group (Flow-GRPO's tracker); None: each is its own.
    Raises:
        ValueError: a group without members, or a reward that is not finite.
    """
    return [_bounded(values, clip, exponential) for values in normalised(groups, scale, biased, epsilon, prompts)]


def advantages_of(
    groups: Sequence[GroupScores],
    terms: Mapping[str, Term],
    combine: Literal["each", "added", "sum"] = "each",
    failed: Literal["leave_out", "fill_mean"] = "leave_out",
    scale: str = "group",
    clip: float = 5.0,
    exponential: bool = False,
    *,
    biased: bool = False,
    epsilon: float = EPSILON,
    prompts: Sequence[str] | None = None,
) -> list[list[float]]:
    """Advantages of every member of every group, of several rewards.

    Args:
        groups: scores by term; every term of `terms` is there, for every member.
        terms: what is trained on. A group that has no score at all of a term gets nothing from it.
        combine: see the module's docstring.
        failed: `fill_mean` puts the mean of the group's other members in the place of a failed score, before the standard
            deviation is taken (public DDRL code). With `leave_out` a member without a score is not in the group at all.
        scale, clip, exponential, biased, epsilon, prompts: as for `group_advantages`.
    Raises:
        ValueError: what `group_advantages` raises; a term that a group lacks; weights that are all 0; with `leave_out`,
            a member without a score.
    """
    total = sum(abs(term.weight) for term in terms.values())
    if total == 0:
        raise ValueError(f"the weights of {', '.join(terms) or 'no rewards'} add up to 0: nothing to learn from")
    filled = {name: [_filled(name, group, term, failed) for group in groups] for name, term in terms.items()}
    sizes = [max(map(len, group.values()), default=0) for group in groups]
    if combine == "sum":
        scored = [[(terms[name].weight, values) for name in terms if (values := filled[name][g])] for g in range(len(groups))]
        sums = [[math.fsum(w * values[m] for w, values in rows) for m in range(n)] for rows, n in zip(scored, sizes, strict=True)]
        return group_advantages(sums, scale, clip, exponential, biased=biased, epsilon=epsilon, prompts=prompts)
    mixed, share = [[0.0] * n for n in sizes], total if combine == "each" else 1.0
    for name, term in terms.items():
        present = [g for g, values in enumerate(filled[name]) if values]
        asked = None if prompts is None else [prompts[g] for g in present]
        for g, values in zip(present, normalised([filled[name][g] for g in present], scale, biased, epsilon, asked), strict=True):
            mixed[g] = [a + term.weight / share * b for a, b in zip(mixed[g], values, strict=True)]
    return [_bounded(values, clip, exponential) for values in mixed]


def _filled(name: str, group: GroupScores, term: Term, failed: str) -> list[float]:
    """A term's scores of one group, clamped and without holes; empty when nobody has one."""
    if name not in group:
        raise ValueError(f"a group has scores of {', '.join(group) or 'nothing'}, none of {name}, which the run trains on; was it made by another recipe?")
    scores = group[name]
    known = [term.clamp(score) for score in scores if score is not None]
    if len(known) < len(scores) and failed == "leave_out":
        raise ValueError(f"{len(scores) - len(known)} of {len(scores)} members have no score of {name}, and objective.failed_reward is leave_out")
    if not known:
        return []
    mean = statistics.fmean(known)
    return [mean if score is None else term.clamp(score) for score in scores]


def normalised(
    groups: Sequence[Sequence[float]], scale: str, biased: bool = False, epsilon: float = EPSILON, prompts: Sequence[str] | None = None
) -> list[list[float]]:
    """(r - mean of the group) / (std + epsilon), neither mapped nor clipped. Raises ValueError like `group_advantages`."""
    for rewards in groups:
        if not rewards:
            raise ValueError("a group needs at least 1 reward, got none")
        if not all(math.isfinite(r) for r in rewards):
            raise ValueError(f"rewards must be finite numbers, got {list(rewards)}")
    std_of = statistics.pstdev if biased else statistics.stdev
    every = [r for rewards in groups for r in rewards]
    names: Sequence[int | str] = range(len(groups)) if prompts is None else prompts
    pools: dict[int | str, list[float]] = {}
    for name, rewards in zip(names, groups, strict=True):
        pools.setdefault(name, []).extend(rewards)
    found = []
    for name, rewards in zip(names, groups, strict=True):
        pool = every if scale == "batch" else pools[name]
        if len(pool) == 1 and not biased:
            found.append(list(rewards))  # nothing to compare with
            continue
        mean, std = statistics.fmean(pools[name]), std_of(pool)
        found.append([(r - mean) / (std + epsilon) for r in rewards])
    return found


def _bounded(raw: Sequence[float], clip: float, exponential: bool) -> list[float]:
    # -exp(-A) overflows for very negative A; anything below -clip is clipped anyway
    mapped = [-math.exp(-max(a, -clip)) for a in raw] if exponential else raw
    return [max(-clip, min(clip, a)) for a in mapped]


def flat_groups(groups: Sequence[GroupScores]) -> int:
    """Groups in which no term varies: nothing in them is better than the rest (their advantages are all 0, or all -1
    after the exponential map). One of one member is none of them: its advantage is its reward."""
    known = [[[s for s in scores if s is not None] for scores in group.values()] for group in groups if max(map(len, group.values()), default=0) > 1]
    return sum(all(not scores or zero_variance(scores) for scores in group) for group in known)
