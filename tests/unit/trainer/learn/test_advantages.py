"""Group-normalised advantages."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.learn.advantages import EPSILON, GroupScores, Term, advantages_of, flat_groups, group_advantages

REWARD = st.floats(-100, 100).map(lambda r: round(r, 3))
GROUP = st.lists(REWARD, min_size=2, max_size=12)
GROUPS = st.lists(GROUP, min_size=1, max_size=6)


@given(groups=GROUPS)
def test_every_group_has_mean_zero_and_nearly_unit_deviation(groups: list[list[float]]) -> None:
    for rewards, found in zip(groups, group_advantages(groups, clip=1e9), strict=True):
        std = statistics.stdev(rewards)
        assert statistics.fmean(found) == pytest.approx(0, abs=1e-6)
        assert statistics.stdev(found) == pytest.approx(std / (std + EPSILON), abs=1e-6)


@given(groups=GROUPS, shift=REWARD)
def test_order_is_kept_and_a_constant_changes_nothing(groups: list[list[float]], shift: float) -> None:
    found = group_advantages(groups)
    for rewards, advantages in zip(groups, found, strict=True):
        assert all(a <= b for (r, a) in zip(rewards, advantages, strict=True) for (q, b) in zip(rewards, advantages, strict=True) if r < q)
    moved = group_advantages([[r + shift for r in rewards] for rewards in groups])
    for a, b in zip(found, moved, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@given(value=REWARD, n=st.integers(2, 20), scale=st.sampled_from(["group", "batch"]))
def test_a_group_of_equal_rewards_has_no_advantage(value: float, n: int, scale: str) -> None:
    found = group_advantages([[value] * n, [0.0, 1.0]], scale)
    assert found[0] == pytest.approx([0] * n, abs=1e-9)
    assert flat_groups([{"r": [value] * n}, {"r": [0.0, 1.0]}, {"r": [value] * n}]) == 2


def test_by_hand() -> None:
    assert group_advantages([[1.0, 2.0, 3.0]])[0] == pytest.approx([-1 / 1.0001, 0, 1 / 1.0001])


@given(groups=GROUPS)
def test_batch_scale_divides_all_groups_by_one_number(groups: list[list[float]]) -> None:
    pooled = statistics.stdev([r for rewards in groups for r in rewards])
    for rewards, found in zip(groups, group_advantages(groups, "batch", clip=1e9), strict=True):
        mean = statistics.fmean(rewards)
        assert found == pytest.approx([(r - mean) / (pooled + EPSILON) for r in rewards], abs=1e-9)


@given(groups=GROUPS, clip=st.floats(0.1, 3), exponential=st.booleans(), scale=st.sampled_from(["group", "batch"]))
def test_the_clip_bounds_every_advantage(groups: list[list[float]], clip: float, exponential: bool, scale: str) -> None:
    free = group_advantages(groups, scale, 1e300, exponential) if not exponential else None
    for i, found in enumerate(group_advantages(groups, scale, clip, exponential)):
        assert all(abs(a) <= clip for a in found)
        if free is not None:
            assert found == [max(-clip, min(clip, a)) for a in free[i]]


def test_one_outlier_is_clipped() -> None:
    found = group_advantages([[0.0] * 40 + [1.0]], clip=5.0)[0]
    assert found[-1] == 5.0
    assert -0.2 < found[0] < 0


@given(rewards=GROUP)
def test_the_exponential_map_is_minus_exp_of_minus(rewards: list[float]) -> None:
    plain = group_advantages([rewards], clip=1e9)[0]
    found = group_advantages([rewards], clip=5.0, exponential=True)[0]
    assert found == pytest.approx([max(-5.0, -math.exp(-max(a, -5.0))) for a in plain])
    assert all(a < 0 for a in found)


def test_the_exponential_map_does_not_overflow() -> None:
    assert group_advantages([[0.0] + [1e6] * 10_000], clip=5.0, exponential=True)[0][0] == -5.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scale", ["group", "batch"])
def test_a_reward_that_is_not_finite_is_refused(bad: float, scale: str) -> None:
    with pytest.raises(ValueError, match="rewards must be finite numbers"):
        group_advantages([[1.0, 2.0], [1.0, bad]], scale)


def test_a_group_needs_a_member() -> None:
    with pytest.raises(ValueError, match="at least 1 reward, got none"):
        group_advantages([[1.0, 2.0], []])


def test_of_a_group_of_one_the_advantage_is_its_reward() -> None:
    """There is nothing to compare with, and no standard deviation over n - 1; over n it is 0."""
    assert group_advantages([[0.7], [9.0], [1.0, 2.0]])[:2] == [[0.7], [5.0]]
    assert group_advantages([[0.7]], biased=True) == [[0.0]]
    assert flat_groups([{"r": [0.7]}, {"r": [1.0, 1.0]}]) == 1


# -- several rewards ------------------------------------------------------------------------------------------------

TERMS = {"ocr": Term(1.0), "scene.sharpness": Term(0.25, (-5.0, 5.0)), "length": Term(-0.5, (0.0, 80.0))}


@st.composite
def several(draw: st.DrawFn, holes: bool = False) -> list[GroupScores]:
    """Up to five groups of two to six members, scored by all of TERMS; with `holes` some scores failed."""
    score = REWARD | st.none() if holes else REWARD
    sizes = draw(st.lists(st.integers(2, 6), min_size=1, max_size=5))
    return [{name: draw(st.lists(score, min_size=n, max_size=n)) for name in TERMS} for n in sizes]


def transcribed(groups: list[GroupScores], combine: str, scale: str, clip: float, exponential: bool) -> list[np.ndarray[Any, Any]]:
    """The formulas of docs/objective.md, in numpy: failed scores are NaN, filled before anything else."""
    filled: dict[str, list[Any]] = {}
    for name, term in TERMS.items():
        low, high = term.clip or (-np.inf, np.inf)
        rows = [np.clip(np.array([np.nan if s is None else s for s in g[name]], dtype=float), low, high) for g in groups]
        filled[name] = [None if np.isnan(r).all() else np.where(np.isnan(r), np.nanmean(r) if np.isfinite(r).any() else 0, r) for r in rows]

    def normal(rows: list[Any]) -> list[Any]:
        there = [r for r in rows if r is not None]
        pooled = np.concatenate(there).std(ddof=1) if there else 0.0
        return [None if r is None else (r - r.mean()) / ((pooled if scale == "batch" else r.std(ddof=1)) + 1e-4) for r in rows]

    out = []
    size = [len(g["ocr"]) for g in groups]
    if combine == "sum":
        totals = [sum((t.weight * filled[n][g] for n, t in TERMS.items() if filled[n][g] is not None), np.zeros(size[g])) for g in range(len(groups))]
        out = normal(totals)
    else:
        each = {n: normal(filled[n]) for n in TERMS}
        weights = sum(abs(t.weight) for t in TERMS.values())
        for g in range(len(groups)):
            parts = [t.weight * each[n][g] for n, t in TERMS.items() if each[n][g] is not None]
            out.append(sum(parts, np.zeros(size[g])) / weights)
    if exponential:
        out = [-np.exp(-np.maximum(a, -clip)) for a in out]
    return [np.clip(a, -clip, clip) for a in out]


@pytest.mark.parametrize("combine", ["each", "sum"])
@given(groups=several(holes=True), scale=st.sampled_from(["group", "batch"]), exponential=st.booleans(), clip=st.floats(0.5, 6))
@settings(max_examples=150)
def test_several_rewards_follow_the_formulas(combine: Any, groups: list[GroupScores], scale: str, exponential: bool, clip: float) -> None:
    found = advantages_of(groups, TERMS, combine, "fill_mean", scale, clip, exponential)
    for one, expected in zip(found, transcribed(groups, combine, scale, clip, exponential), strict=True):
        assert one == pytest.approx(expected.tolist(), abs=1e-6, rel=1e-6)


@given(groups=GROUPS, scale=st.sampled_from(["group", "batch"]), exponential=st.booleans())
def test_one_reward_of_weight_one_is_the_plain_formula_either_way(groups: list[list[float]], scale: str, exponential: bool) -> None:
    plain = group_advantages(groups, scale, 5.0, exponential)
    scores: list[GroupScores] = [{"ocr": rewards} for rewards in groups]
    for combine in ("each", "sum"):
        for one, expected in zip(advantages_of(scores, {"ocr": Term()}, combine, "leave_out", scale, 5.0, exponential), plain, strict=True):  # type: ignore[arg-type]
            assert one == pytest.approx(expected, abs=1e-12)


@given(groups=several(), factor=st.floats(2, 1000))
def test_each_does_not_hear_how_loud_a_reward_is(groups: list[GroupScores], factor: float) -> None:
    """The units of a reward do not decide its say; its weight does. Exact but for the 1e-4 beside the deviation."""
    spread = [{"a": [s * 10 for s in g["ocr"]], "b": g["length"]} for g in groups]  # type: ignore[operator]
    louder = [{"a": g["a"], "b": [s * factor for s in g["b"]]} for g in spread]  # type: ignore[operator]
    two = {"a": Term(), "b": Term()}
    for g, (one, other) in enumerate(zip(advantages_of(spread, two, "each"), advantages_of(louder, two, "each"), strict=True)):
        if all(statistics.stdev(spread[g][n]) > 0.1 for n in two):  # type: ignore[type-var]
            assert one == pytest.approx(other, abs=5e-3)


def test_each_and_sum_by_hand() -> None:
    groups: list[GroupScores] = [{"ocr": [0.0, 1.0], "sharpness": [30.0, 10.0]}]
    terms = {"ocr": Term(), "sharpness": Term()}
    assert advantages_of(groups, terms, "sum")[0] == pytest.approx([math.sqrt(0.5), -math.sqrt(0.5)], rel=1e-4)
    assert advantages_of(groups, terms, "each")[0] == pytest.approx([0, 0], abs=1e-3)
    heavier = advantages_of(groups, {"ocr": Term(3.0), "sharpness": Term(1.0)}, "each")[0]
    assert heavier == pytest.approx([-0.5 * math.sqrt(0.5), 0.5 * math.sqrt(0.5)], rel=1e-3)  # (3 - 1) / 4
    clipped = advantages_of(groups, {"ocr": Term(), "sharpness": Term(clip=(0.0, 10.0))}, "sum")[0]
    assert clipped[0] < 0 < clipped[1]  # sharpness is 10 for both, so ocr decides


def test_a_failed_score_becomes_the_mean_before_the_deviation() -> None:
    """[0, 1, mean 0.5]: the member has no advantage, and the deviation is that of three numbers, 0.5, not of two, 0.707."""
    found = advantages_of([{"ocr": [0.0, 1.0, None]}], {"ocr": Term()}, failed="fill_mean")[0]
    assert found == pytest.approx([-1 / 1.0002, 1 / 1.0002, 0], abs=1e-9)


def test_a_reward_that_scored_nobody_of_a_group_says_nothing_there() -> None:
    groups: list[GroupScores] = [{"ocr": [0.0, 1.0], "aux": [None, None]}, {"ocr": [1.0, 0.0], "aux": [3.0, 4.0]}]
    terms = {"ocr": Term(), "aux": Term()}
    for scale in ("group", "batch"):
        one, two = advantages_of(groups, terms, "each", "fill_mean", scale)
        alone = advantages_of([{"ocr": g["ocr"]} for g in groups], {"ocr": Term()}, scale=scale)
        assert one == pytest.approx([a / 2 for a in alone[0]])
        assert two == pytest.approx([0, 0], abs=0.2)  # the two rewards contradict each other
        assert advantages_of(groups, terms, "sum", "fill_mean", scale)[0][1] > 0


def test_groups_in_which_no_term_varies() -> None:
    groups: list[GroupScores] = [{"a": [1.0, 1.0], "b": [0.0, 0.5]}, {"a": [1.0, 1.0, None], "b": [2.0, 2.0, 2.0]}, {"a": [None, None], "b": [3.0, 3.0]}]
    assert flat_groups(groups) == 2


def test_what_cannot_be_combined_is_refused() -> None:
    with pytest.raises(ValueError, match="1 of 2 members have no score of ocr, and objective"):
        advantages_of([{"ocr": [1.0, None]}], {"ocr": Term()})
    with pytest.raises(ValueError, match="a group has scores of jpeg, none of ocr"):
        advantages_of([{"jpeg": [1.0, 2.0]}], {"ocr": Term()})
    with pytest.raises(ValueError, match="the weights of ocr add up to 0"):
        advantages_of([{"ocr": [1.0, 2.0]}], {"ocr": Term(0.0)})
    with pytest.raises(ValueError, match="rewards must be finite numbers"):
        advantages_of([{"ocr": [1.0, math.nan]}], {"ocr": Term()})
