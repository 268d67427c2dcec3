"""The arithmetic of benchmarks/pipeline.py."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.pipeline import samples, steady


def record(time: float, groups: int, failed: int = 0, wait: float = 0.5) -> dict[str, Any]:
    return {"time": time, "trained_groups": list(range(groups)), "failed_members": failed, "seconds": {"wait": wait}}


def test_the_steady_state_begins_when_the_lead_is_used_up() -> None:
    start = [record(40, 8, wait=40), record(45, 8), record(50, 8)]
    found = steady([*start, record(54, 8), record(58, 8, failed=28)], group_size=16)
    assert found["samples_per_s"] == pytest.approx((128 + 100) / 8)
    assert found["update_s"] == pytest.approx(4)
    assert found["wait_s"] == pytest.approx(0.5)


def test_members_without_a_score_were_not_learnt_on() -> None:
    assert samples(record(0, 2, failed=3), 16) == 29


def test_three_updates_have_no_steady_state() -> None:
    with pytest.raises(ValueError, match="more than 3"):
        steady([record(i, 8) for i in range(3)], 16)
