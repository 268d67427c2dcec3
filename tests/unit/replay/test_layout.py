"""Segments, blocks and parts: every byte in one block, no part above its bound, nothing unverified comes back."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from hypothesis import given, settings
from hypothesis import strategies as st

import replay.layout
import replay.reading
from replay.errors import PayloadCorrupt, PayloadMissing, ReplayError
from replay.layout import Layout, checksum, pack, part_names, reference
from replay.payloads import FolderPayloads
from replay.reading import read_segments

NOWHERE = redis.Redis().pipeline(transaction=False)  # never executed: the folder writes at once


def written(folder: Path, segments: Sequence[bytes], part_bytes: int) -> tuple[FolderPayloads, str, Layout]:
    store, packed = FolderPayloads(folder), pack(segments, part_bytes)
    return store, store.write("g1-a", packed.parts, NOWHERE), packed.layout


def test_checksum_is_xxh3() -> None:
    assert checksum(b"") == "2d06800538d394c2"  # the published XXH3-64 of the empty input


@given(segments=st.lists(st.binary(max_size=40), min_size=1, max_size=6), part_bytes=st.integers(1, 60), shared=st.integers(0, 30), block=st.integers(1, 20))
@settings(max_examples=100)
def test_every_byte_lies_in_one_block_of_one_part(segments: list[bytes], part_bytes: int, shared: int, block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.layout, "SHARED_BYTES", shared)
        patch.setattr(replay.layout, "BLOCK_BYTES", block)
        packed = pack(segments, part_bytes)
    layout, parts = packed.layout, [b"".join(pieces) for pieces in packed.parts]
    assert b"".join(parts) == b"".join(segments)
    assert layout.part_sizes == [len(part) for part in parts]
    assert max(layout.part_sizes) <= part_bytes
    assert packed.bytes == sum(map(len, segments))
    assert layout.segments == len(segments)
    for number, segment in enumerate(segments):
        blocks = layout.of(number)
        assert b"".join(parts[b.part][b.offset : b.offset + b.size] for b in blocks) == segment
        assert all(b.digest == checksum(parts[b.part][b.offset : b.offset + b.size]) and b.size <= block for b in blocks)
    assert Layout.parse(layout.text()) == layout
    assert len(part_names(reference("g1-a", len(parts)))) == len(parts)


def test_small_segments_share_a_part_and_a_large_one_is_stored_as_it_lies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay.layout, "SHARED_BYTES", 8)
    monkeypatch.setattr(replay.layout, "BLOCK_BYTES", 10)
    large = bytes(range(25))
    packed = pack([b"head", b"tail", large, b"end"], 20)
    assert packed.layout.part_sizes == [8, 20, 8]
    assert [len(pieces) for pieces in packed.parts] == [2, 1, 2]
    assert packed.parts[1][0].obj is large


def test_a_payload_without_segments_and_a_segment_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="at least one"):
        pack([], 10)
    with pytest.raises(ReplayError, match="of 2 segments has none of number 2"):
        pack([b"a", b"b"], 10).layout.of(2)


@pytest.mark.parametrize("text", ["", "0123456789abcdef", "0/0/3/xyz", "0/0/3/0123456789abcdef 1/0"])
def test_a_payload_of_another_version_is_refused(text: str) -> None:
    with pytest.raises(ReplayError, match="another version of ddrl: finish the run with that one"):
        Layout.parse(text)


@given(wanted=st.lists(st.integers(0, 4), min_size=1, max_size=6), part_bytes=st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_segments_come_back_in_the_order_asked_for(wanted: list[int], part_bytes: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    segments = [b"head", b"", b"x" * 30, b"y" * 31, b"end"]
    store, ref, layout = written(tmp_path_factory.mktemp("p"), segments, part_bytes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(replay.reading, "ALONE_BYTES", 16)  # above: several lanes
        assert read_segments(store, ref, layout, wanted) == [segments[i] for i in wanted]


class Counting(FolderPayloads):
    """Keeps what was read: (part, offset, bytes)."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.reads: list[tuple[int, int, int]] = []

    def read(self, ref: str, part: int, offset: int, into: memoryview) -> int:
        self.reads.append((part, offset, len(into)))
        return super().read(ref, part, offset, into)


def test_only_what_is_asked_for_is_read_and_neighbours_together(tmp_path: Path) -> None:
    store, packed = Counting(tmp_path), pack([b"head", b"0000", b"1111", b"2222"], 100)
    ref = store.write("g1-a", packed.parts, NOWHERE)
    read_segments(store, ref, packed.layout, [0, 2, 3])
    assert store.reads == [(0, 0, 4), (0, 8, 8)]


@pytest.mark.parametrize("lanes", [False, True])
@pytest.mark.parametrize("part", [0, 1, 2])
def test_damage_is_noticed_by_whoever_reads_it_and_by_nobody_else(part: int, lanes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if lanes:
        monkeypatch.setattr(replay.reading, "ALONE_BYTES", 0)
    store, ref, layout = written(tmp_path, [b"aaaa", b"bbbb", b"cccc"], 4)
    file = tmp_path / f"g1-a.{part}"
    content = file.read_bytes()
    others = [i for i in range(3) if i != part]
    for damaged, words in ((content[:2] + b"!" + content[3:], "checksum"), (content[:-1], "ends before them")):
        file.write_bytes(damaged)
        with pytest.raises(PayloadCorrupt, match=f"{words}.*the ledger says {layout.of(part)[0].digest}"):
            read_segments(store, ref, layout, range(3))
        assert len(read_segments(store, ref, layout, others)) == 2
    file.unlink()
    with pytest.raises(PayloadMissing, match=f"g1-a.{part} is gone"):
        read_segments(store, ref, layout, range(3))
    assert len(read_segments(store, ref, layout, others)) == 2


@pytest.mark.parametrize("number", [0, 1, 2])
def test_of_neighbours_read_together_each_is_verified(number: int, tmp_path: Path) -> None:
    store, ref, layout = written(tmp_path, [b"aaaa", b"bbbb", b"cccc"], 100)
    content = bytearray((tmp_path / "g1-a").read_bytes())
    content[4 * number + 1] ^= 1
    (tmp_path / "g1-a").write_bytes(content)
    with pytest.raises(PayloadCorrupt, match=f"4 bytes at {4 * number}: checksum"):
        read_segments(store, ref, layout, range(3))


class Made(Sequence[bytes]):
    """Segments that are made as they are asked for; keeps which were, and how many were there when the next one was asked for."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self.sizes, self.asked, self.alive, self.most = sizes, list[int](), list[weakref.ref[Any]](), 0

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: Any) -> Any:
        self.most = max(self.most, sum(one() is not None for one in self.alive))
        self.asked.append(index)
        made = np.full(self.sizes[index], index, np.uint8)
        self.alive.append(weakref.ref(made))
        return memoryview(made)


def test_segments_are_made_when_they_are_asked_for_and_one_is_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay.layout, "SHARED_BYTES", 4)
    monkeypatch.setattr(replay.layout, "BLOCK_BYTES", 8)
    segments = Made([4, 30, 31, 32])
    packed = pack(segments, 16)
    assert (segments.asked, segments.most) == ([0, 1, 2, 3], 0)
    store = FolderPayloads(tmp_path)
    ref = store.write("g1-a", packed.parts, NOWHERE)
    assert (segments.asked[4:], segments.most) == ([0, 1, 2, 3], 0), "each once more, whatever the number of its parts"
    assert [bytes(found) for found in read_segments(store, ref, packed.layout, range(4))] == [bytes([i]) * size for i, size in enumerate(segments.sizes)]
