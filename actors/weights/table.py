"""The table of a version: which slice of which tensor lies where. Pure: neither torch nor Ray.

    rank 0  Shard(entries: w[0:3], b[0:2], buffer[:])  ┐
    rank 1  Shard(entries: w[3:5], b[2:3])             ┴ complete ─► Table(w, b, buffer)

Invariant: a table's slices cover every tensor once, without a gap; shards that do not are refused before anybody reads.

    >>> half = [Entry("w", (5,), (0,), (3,), "float32", "…", "a"), Entry("w", (5,), (3,), (2,), "float32", "…", "b")]
    >>> complete([Shard(1, 7, rank, 2, (entry,)) for rank, entry in enumerate(half)]).shapes
    {'w': (5,)}
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import xxhash
from pydantic import TypeAdapter, ValidationError

Name = tuple[int, int]
"""Lineage and version: after a return to a checkpoint the same version number means other weights."""
Sizes = tuple[int, ...]


class TableError(ValueError):
    """Shards that do not make a version, or bytes that are no table."""


@dataclass(frozen=True)
class Entry:
    """One slice of one tensor.

    Attributes:
        name: of the tensor.
        shape: of the whole tensor.
        start, size: the slice, by dimension.
        dtype: as torch names it, without `torch.`.
        digest: xxh3-64 of its bytes (row-major), hex: against corruption, not against an adversary.
        where: the part it lies in, as its transport names it.
    """

    name: str
    shape: Sizes
    start: Sizes
    size: Sizes
    dtype: str
    digest: str
    where: str


@dataclass(frozen=True)
class Shard:
    """What one rank hands in of a version. `lineage` is the learner's epoch; `wanted`: an evaluation will ask for this very version."""

    lineage: int
    version: int
    rank: int
    world: int
    entries: tuple[Entry, ...]
    wanted: bool = False

    @property
    def name(self) -> Name:
        return self.lineage, self.version

    def dumps(self) -> bytes:
        """As JSON."""
        return _SHARD.dump_json(self)

    @staticmethod
    def loads(data: bytes) -> Shard:
        """From `dumps`. Raises TableError."""
        try:
            return _SHARD.validate_json(data)
        except ValidationError as error:
            raise TableError(f"no table of a shard: {error.errors()[0]['msg']}") from None


_SHARD = TypeAdapter(Shard)


@dataclass(frozen=True)
class Table:
    """A whole version."""

    lineage: int
    version: int
    entries: tuple[Entry, ...]

    @property
    def name(self) -> Name:
        return self.lineage, self.version

    @cached_property
    def shapes(self) -> dict[str, Sizes]:
        """Shape of every tensor."""
        return {entry.name: entry.shape for entry in self.entries}

    @cached_property
    def digest(self) -> str:
        """Of every slice and its place: equal where the same ranks handed in the same weights."""
        whole = xxhash.xxh3_128()
        for entry in self.entries:
            whole.update(repr((entry.name, entry.start, entry.size, entry.dtype, entry.digest)).encode())
        return whole.hexdigest()


def complete(shards: Sequence[Shard]) -> Table:
    """The table of a version from the shards of all its ranks.

    Raises:
        TableError: ranks that are missing or there twice, of several versions, or slices that leave a gap, overlap or disagree.
    """
    first = shards[0]
    if sorted((s.name, s.world, s.rank) for s in shards) != [(first.name, first.world, rank) for rank in range(first.world)]:
        raise TableError(f"version {first.version} needs one shard of each of {first.world} ranks, found {[(s.name, s.rank) for s in shards]}")
    entries = tuple(sorted((entry for shard in shards for entry in shard.entries), key=lambda e: (e.name, e.start)))
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    for name, slices in by_name.items():
        wrong = _wrong(slices)
        if wrong:
            raise TableError(f"version {first.version}: the slices of {name} {wrong}; ranks disagree about how it is cut")
    return Table(first.lineage, first.version, entries)


def _wrong(slices: list[Entry]) -> str | None:
    """What is wrong with the slices of one tensor, which come sorted by their start."""
    shape = slices[0].shape
    if any(s.shape != shape or s.dtype != slices[0].dtype for s in slices):
        return "are of several shapes or types"
    if not all(_inside(s) for s in slices):
        return f"lie outside of its shape {shape}"
    for i, one in enumerate(slices):
        for other in slices[i + 1 :]:
            if shape and other.start[0] >= one.start[0] + one.size[0]:
                break  # nor does any after it
            if overlap(one, other.start, other.size) is not None:
                return "overlap"
    covered = sum(prod(s.size) for s in slices)
    return None if covered == prod(shape) else f"hold {covered} of its {prod(shape)} values"


def _inside(entry: Entry) -> bool:
    """Whether a slice lies in its tensor."""
    if not len(entry.start) == len(entry.size) == len(entry.shape):
        return False
    return all(0 <= a <= a + n <= whole for a, n, whole in zip(entry.start, entry.size, entry.shape, strict=True))


def overlap(entry: Entry, start: Sizes, size: Sizes) -> tuple[Sizes, Sizes] | None:
    """(start, size) of what the slice of `entry` shares with another; None where that is nothing."""
    low = tuple(max(a, b) for a, b in zip(entry.start, start, strict=True))
    high = tuple(min(a + n, b + m) for a, n, b, m in zip(entry.start, entry.size, start, size, strict=True))
    shared = tuple(h - a for a, h in zip(low, high, strict=True))
    return None if any(n <= 0 for n in shared) else (low, shared)


def parts_of(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """Entries by the part they lie in."""
    parts: dict[str, list[Entry]] = {}
    for entry in entries:
        parts.setdefault(entry.where, []).append(entry)
    return parts
