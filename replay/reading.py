"""Segments of a payload, read in parallel and verified block by block.

Invariant: bytes leave this module only after every block of theirs has matched its digest in the ledger.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from replay.errors import PayloadCorrupt
from replay.layout import BLOCK_BYTES, Block, Layout, checksum
from replay.payloads import PayloadStore

LANES = 4
"""Connections or files that are read from at a time."""
ALONE_BYTES = 4 << 20
"""Up to here one reader is as fast as several."""


def read_segments(store: PayloadStore, ref: str, layout: Layout, segments: Sequence[int]) -> list[memoryview]:
    """The segments asked for, in that order: views of one buffer, in which they follow each other.

    Raises PayloadMissing, PayloadCorrupt, and ReplayError for a segment that is not there.
    """
    chosen = [layout.of(segment) for segment in segments]
    sizes = [sum(block.size for block in blocks) for blocks in chosen]
    whole = memoryview(bytearray(sum(sizes)))
    stretches, start = [], 0
    for stretch in _stretches([block for blocks in chosen for block in blocks]):
        size = sum(block.size for block in stretch)
        stretches.append((stretch, whole[start : start + size]))
        start += size

    def read(work: tuple[list[Block], memoryview]) -> None:
        blocks, into = work
        held = store.read(ref, blocks[0].part, blocks[0].offset, into)
        begin = 0
        for block in blocks:
            place = f"payload {ref}, part {block.part}, {block.size} bytes at {block.offset}"
            if held < begin + block.size:
                raise PayloadCorrupt(f"{place}: the part ends before them, the ledger says {block.digest}")
            found = checksum(into[begin : begin + block.size])
            if found != block.digest:
                raise PayloadCorrupt(f"{place}: checksum {found}, the ledger says {block.digest}")
            begin += block.size

    if len(stretches) == 1 or len(whole) <= ALONE_BYTES:
        for work in stretches:
            read(work)
    else:
        with ThreadPoolExecutor(min(LANES, len(stretches)), "payload") as lanes:
            list(lanes.map(read, stretches))
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return [whole[end - size : end] for end, size in zip(ends, sizes, strict=True)]


def _stretches(blocks: Sequence[Block]) -> list[list[Block]]:
    """Blocks that follow each other in one part, together as long as they are no more than a block may be."""
    found: list[list[Block]] = []
    for block in blocks:
        last = found[-1] if found else []
        follows = bool(last) and (last[-1].part, last[-1].offset + last[-1].size) == (block.part, block.offset)
        if follows and block.offset + block.size - last[0].offset <= BLOCK_BYTES:
            last.append(block)
        else:
            found.append([block])
    return found
