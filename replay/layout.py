"""What a payload is made of: segments that are read apart, blocks that are verified apart, parts that are stored apart.

The caller hands in segments (a head, then one for each member of a group) and may later ask for any of them. Invariant:
every byte lies in exactly one block, and a block is read whole and compared with its digest before anyone sees it.

    >>> packed = pack([b"head", b"member 0", b"member 1"], part_bytes=6)
    >>> [(b.segment, b.part, b.offset, b.size) for b in packed.layout.blocks]
    [(0, 0, 0, 4), (1, 1, 0, 6), (1, 2, 0, 2), (2, 3, 0, 6), (2, 4, 0, 2)]

Small segments share a part, so that a small payload is one value; a larger one begins a part of its own, which is then
stored without being copied. Segments may be made as they are asked for: each is asked for once to be laid out and once whenever it is
stored, and at any time one of them is held.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import overload

import xxhash

from replay.errors import ReplayError

Buffer = bytes | bytearray | memoryview

BLOCK_BYTES = 8 << 20
"""Most bytes of a block: what one reader reads and verifies at a time, and the server holds for it meanwhile."""
SHARED_BYTES = 1 << 20
"""Segments share a part up to this size."""


def checksum(content: Buffer) -> str:
    """xxh3-64 of the bytes as 16 hex digits: guards against corruption, not against an adversary."""
    return xxhash.xxh3_64_hexdigest(content)


@dataclass(frozen=True)
class Block:
    """`size` bytes of a segment, at `offset` in a part."""

    segment: int
    part: int
    offset: int
    size: int
    digest: str


@dataclass(frozen=True)
class Layout:
    """The blocks of a payload, in order. The ledger keeps it as one text beside the payload's reference."""

    blocks: tuple[Block, ...]

    @property
    def part_sizes(self) -> list[int]:
        """Bytes of every part."""
        sizes = [0] * (self.blocks[-1].part + 1)
        for block in self.blocks:
            sizes[block.part] += block.size
        return sizes

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return self.blocks[-1].segment + 1

    def of(self, segment: int) -> list[Block]:
        """The blocks of a segment. Raises ReplayError when there is none such."""
        found = [block for block in self.blocks if block.segment == segment]
        if not found:
            raise ReplayError(f"a payload of {self.segments} segments has none of number {segment}")
        return found

    def text(self) -> str:
        """`segment/part/size/digest` of every block, with blanks between."""
        return " ".join(f"{b.segment}/{b.part}/{b.size}/{b.digest}" for b in self.blocks)

    @classmethod
    def parse(cls, text: str) -> "Layout":
        """Raises ReplayError on the text of another version."""
        blocks: list[Block] = []
        for word in text.split(" "):
            found = re.fullmatch(r"(\d+)/(\d+)/(\d+)/([0-9a-f]{16})", word)
            if found is None:
                raise ReplayError(
                    f"a payload with the checksum {text!r} was stored by another version of ddrl: finish the run with that one, or start a new run"
                )
            segment, part, size = (int(number) for number in found.groups()[:3])
            last = blocks[-1] if blocks else None
            offset = last.offset + last.size if last is not None and last.part == part else 0
            blocks.append(Block(segment, part, offset, size, found[4]))
        return cls(tuple(blocks))


class Parts(Sequence[list[memoryview]]):
    """The pieces of every part: views of the caller's segments, of which the last that was looked at is held."""

    def __init__(self, segments: Sequence[Buffer], places: list[list[tuple[int, int, int]]]) -> None:
        """`places`: of each part's pieces the segment, where it begins there, and how many bytes it has."""
        self._segments, self._places = segments, places
        self._held: tuple[int, memoryview] | None = None

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> list[memoryview]: ...
    @overload
    def __getitem__(self, index: slice) -> list[list[memoryview]]: ...
    def __getitem__(self, index: int | slice) -> list[memoryview] | list[list[memoryview]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return [self._segment(number)[start : start + size] for number, start, size in self._places[index]]

    def _segment(self, number: int) -> memoryview:
        if self._held is None or self._held[0] != number:
            self._held = None  # before the next one is made
            self._held = number, _flat(self._segments[number])
        return self._held[1]


@dataclass(frozen=True)
class Packed:
    """A payload ready to be stored: its layout, and the pieces of every part."""

    layout: Layout
    parts: Parts

    @property
    def bytes(self) -> int:
        return sum(self.layout.part_sizes)


def pack(segments: Buffer | Sequence[Buffer], part_bytes: int) -> Packed:
    """Lay out segments (bytes alone are one) in parts of at most `part_bytes`. An empty segment has one empty block.

    Raises ValueError without any segment.
    """
    given = [segments] if isinstance(segments, bytes | bytearray | memoryview) else segments
    if not given:
        raise ValueError("a payload has at least one segment")
    block_bytes, shared = min(BLOCK_BYTES, part_bytes), min(SHARED_BYTES, part_bytes)
    blocks: list[Block] = []
    parts: list[list[tuple[int, int, int]]] = [[]]
    filled = 0
    for number in range(len(given)):
        view = _flat(given[number])
        for start in range(0, max(1, len(view)), block_bytes):
            piece = view[start : start + block_bytes]
            size = len(piece)
            if filled and filled + size > (part_bytes if start else shared):
                parts.append([])
                filled = 0
            blocks.append(Block(number, len(parts) - 1, filled, size, checksum(piece)))
            if start and filled:  # one view of the segment as far as it lies in this part: stored without being joined
                _, begin, held = parts[-1][-1]
                parts[-1][-1] = number, begin, held + size
            else:
                parts[-1].append((number, start, size))
            filled += size
        del view, piece  # before the next segment is made
    return Packed(Layout(tuple(blocks)), Parts(given, parts))


def _flat(content: Buffer) -> memoryview:
    view = memoryview(content)
    return view.cast("B") if view.nbytes else memoryview(b"")


def reference(name: str, parts: int) -> str:
    """What the ledger knows a payload of `parts` parts by: `'g5-ab'`, or `'g5-ab+3'` for three."""
    return name if parts == 1 else f"{name}+{parts}"


def part_names(ref: str) -> list[str]:
    """Names of its parts in the store: `'g5-ab' → ['g5-ab']`, `'g5-ab+3' → ['g5-ab.0', 'g5-ab.1', 'g5-ab.2']`."""
    name, _, parts = ref.partition("+")
    return [f"{name}.{part}" for part in range(int(parts))] if parts else [name]
