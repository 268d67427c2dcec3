"""The micro-batch plan: which rank computes which rows in which forward pass. Pure: no torch.

Invariant: every rank makes the same number of forward and backward passes, or FSDP's collectives hang. The plan is
computed from counts that all ranks share. A rank with fewer rows gets smaller passes, and a pass without rows is a
padding pass: one row of weight zero. What is shared are members of groups, not groups, so ranks may outnumber groups; a share
is consecutive, so that a rank reads the heads of few groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise


def cut(count: int, rank: int, world: int) -> range:
    """Indices of `count` items that belong to `rank`: consecutive ones, perhaps none."""
    return range(count * rank // world, count * (rank + 1) // world)


def share(count: int, rank: int, world: int) -> range:
    """`cut`. Raises ValueError when some rank would get none."""
    if count < world:
        raise ValueError(f"{count} items cannot be shared among {world} ranks; raise the batch or lower learner.ranks")
    return cut(count, rank, world)


def members(sizes: Sequence[int], part: range) -> dict[int, range]:
    """A share of all members of groups, by group: `members([2, 3], range(1, 4)) → {0: range(1, 2), 1: range(0, 2)}`."""
    found, first = {}, 0
    for group, size in enumerate(sizes):
        own = range(max(part.start - first, 0), min(part.stop - first, size))
        if own:
            found[group] = own
        first += size
    return found


def passes(row_counts: list[int], micro_batch: int) -> int:
    """Forward passes every rank makes: enough for the rank with most rows."""
    return max(-(-rows // micro_batch) for rows in row_counts)


def slices(rows: int, count: int) -> list[slice]:
    """`rows` rows in `count` consecutive slices of sizes that differ by at most one; may be empty when rows < count."""
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]
