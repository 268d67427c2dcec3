"""The micro-batch plan: every row once, and as many passes on every rank."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.learn.plan import members, passes, share, slices


@given(count=st.integers(1, 60), world=st.integers(1, 8))
def test_every_item_belongs_to_one_rank(count: int, world: int) -> None:
    if count < world:
        with pytest.raises(ValueError, match=f"{count} items cannot be shared among {world} ranks"):
            share(count, 0, world)
        return
    shares = [share(count, rank, world) for rank in range(world)]
    assert [i for part in shares for i in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(sizes=st.lists(st.integers(0, 6), min_size=1, max_size=8), world=st.integers(1, 8))
def test_every_member_belongs_to_one_rank_and_ranks_may_outnumber_groups(sizes: list[int], world: int) -> None:
    if sum(sizes) < world:
        return
    found = [(group, m) for rank in range(world) for group, own in members(sizes, share(sum(sizes), rank, world)).items() for m in own]
    assert found == [(group, m) for group, size in enumerate(sizes) for m in range(size)]


@given(rows=st.lists(st.integers(1, 50), min_size=1, max_size=8), micro=st.integers(1, 20))
def test_every_row_is_computed_once_in_equally_many_passes(rows: list[int], micro: int) -> None:
    count = passes(rows, micro)
    for own in rows:
        parts = slices(own, count)
        assert len(parts) == count
        assert [i for part in parts for i in range(own)[part]] == list(range(own))
        assert all(part.stop - part.start <= micro for part in parts)
        sizes = {part.stop - part.start for part in parts}
        assert max(sizes) - min(sizes) <= 1
    assert (count - 1) * micro < max(rows)  # not one pass more than the fullest rank needs


def test_worked_example() -> None:
    assert share(5, 1, 2) == range(2, 5)
    assert members([2, 3], range(1, 4)) == {0: range(1, 2), 1: range(2)}
    assert passes([30, 20], 8) == 4
    assert slices(6, 4) == [slice(0, 1), slice(1, 3), slice(3, 4), slice(4, 6)]
    assert slices(1, 2) == [slice(0, 0), slice(0, 1)]
