"""The micro-batch plan: which rank computes which rows in which forward pass. Pure: no torch.

Invariant: every rank makes the same number of forward and backward passes, or FSDP's collectives hang. The plan is
computed from counts that all ranks share. A rank with fewer rows gets smaller passes, and a pass without rows is a
padding pass: one row of weight zero.
"""

from __future__ import annotations

from itertools import pairwise


def share(count: int, rank: int, world: int) -> list[int]:
    """Indices of `count` items that belong to `rank`: every `world`-th. Raises ValueError when some rank would get none."""
    if count < world:
        raise ValueError(f"{count} items cannot be shared among {world} ranks; raise the batch or lower learner.ranks")
    return list(range(rank, count, world))


def passes(row_counts: list[int], micro_batch: int) -> int:
    """Forward passes every rank makes: enough for the rank with most rows."""
    return max(-(-rows // micro_batch) for rows in row_counts)


def slices(rows: int, count: int) -> list[slice]:
    """`rows` rows in `count` consecutive slices of sizes that differ by at most one; may be empty when rows < count."""
    bounds = [rows * i // count for i in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]
