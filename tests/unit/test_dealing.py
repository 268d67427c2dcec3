"""The order in which files go to parallel workers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import CLUSTER, LONG, dealt, group_of

TESTS = Path(__file__).resolve().parents[1]


def test_long_groups_are_groups() -> None:
    assert [group for group in LONG if group != CLUSTER and not (TESTS / group).is_file()] == []
    assert len(set(LONG)) == len(LONG)


def test_each_worker_gets_a_long_file_then_a_short_one() -> None:
    short = [f"unit/test_{i}.py" for i in range(5)]
    assert dealt([*short, LONG[2], LONG[1], LONG[0]], 2) == [LONG[0], LONG[1], *short[:2], LONG[2], *short[2:]]


def test_a_file_is_a_group_and_what_shares_the_cluster_is_one(request: pytest.FixtureRequest) -> None:
    assert group_of(request.node) == "unit/test_dealing.py"
    request.node.fixturenames.append(CLUSTER)
    assert group_of(request.node) == CLUSTER
