"""Group-normalised advantages."""

from __future__ import annotations

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.learn.advantages import EPSILON, group_advantages, zero_variance

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
    assert zero_variance([[value] * n, [0.0, 1.0], [value] * n]) == 2


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


@pytest.mark.parametrize("group", [[], [1.0]])
def test_a_group_needs_two_members(group: list[float]) -> None:
    with pytest.raises(ValueError, match=f"at least 2 rewards, got {len(group)}"):
        group_advantages([[1.0, 2.0], group])
