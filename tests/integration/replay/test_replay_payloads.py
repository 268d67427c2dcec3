"""One contract, two stores: bytes in Redis and files in a shared folder."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from replay.buffer import BufferSettings, ReplayBuffer
from replay.errors import ImpossibleSettings, PayloadCorrupt, PayloadMissing, ReplayError
from replay.layout import pack, part_names
from replay.payloads import FolderPayloads, PayloadStore, make_payloads, orphan_age_s

Make = Callable[..., Any]
SETTINGS = BufferSettings(groups_per_step=2, data_per_step=1, lease_s=100.0)


class Place:
    """A store and the ways a test reaches behind it."""

    def __init__(self, kind: str, client: redis.Redis, run: str, folder: Path) -> None:
        self.kind, self.client, self.folder = kind, client, folder / run
        self.prefix = f"ddrl:{{{run}}}:payload:"
        self.store: PayloadStore = make_payloads("redis" if kind == "redis" else str(folder), client, run, SETTINGS)

    def write(self, name: str, payload: bytes, part_bytes: int = 1 << 20) -> str:
        batch = self.client.pipeline(transaction=False)
        ref = self.store.write(name, pack(payload, part_bytes).parts, batch)
        batch.execute()
        return ref

    def read(self, ref: str, size: int, part: int = 0, offset: int = 0) -> bytes:
        into = memoryview(bytearray(size))
        return bytes(into[: self.store.read(ref, part, offset, into)])

    def names(self) -> set[str]:
        if self.kind == "redis":
            return {key.decode().removeprefix(self.prefix) for key in self.client.scan_iter(self.prefix + "*")}
        return {file.name for file in self.folder.iterdir()}

    def damage(self, ref: str) -> None:
        if self.kind == "redis":
            self.client.setrange(self.prefix + ref, 3, b"!")
            return
        path = self.folder / ref
        path.write_bytes(path.read_bytes()[:3] + b"!" + path.read_bytes()[4:])

    def shorten(self, ref: str) -> None:
        if self.kind == "redis":
            self.client.set(self.prefix + ref, self.client.get(self.prefix + ref)[:-1], keepttl=True)
            return
        os.truncate(self.folder / ref, (self.folder / ref).stat().st_size - 1)

    def age(self, ref: str, seconds: float) -> None:
        """As if `ref` had been written `seconds` ago."""
        if self.kind == "redis":
            for name in part_names(ref):
                self.client.pexpire(self.prefix + name, int((orphan_age_s(SETTINGS) - seconds) * 1000))
            return
        now = self.folder.stat().st_mtime
        for name in part_names(ref):
            os.utime(self.folder / name, (now - seconds, now - seconds))


@pytest.fixture(params=["redis", "folder"])
def place(request: pytest.FixtureRequest, client: redis.Redis, tmp_path: Path) -> Place:
    return Place(request.param, client, f"payloads-{secrets.token_hex(4)}", tmp_path)


def test_bytes_come_back_whole_and_go_once(place: Place) -> None:
    payloads = {f"g{size}-a": os.urandom(size) for size in (0, 1, 1000, 900_000)}
    refs = {name: place.write(name, payload) for name, payload in payloads.items()}
    assert refs == {name: name for name in payloads}
    assert {name: place.read(ref, len(payloads[name]) + 3) for name, ref in refs.items()} == payloads
    assert place.read("g1000-a", 7, offset=990) == payloads["g1000-a"][990:997]
    place.write("g1-a", b"again")
    assert place.read(refs["g1-a"], 5) == b"again", "a commit that is repeated writes again"
    place.store.delete(list(refs.values()))
    place.store.delete(list(refs.values()))
    place.store.delete([])
    for ref in refs.values():
        for size in (0, 1):
            with pytest.raises(PayloadMissing, match=ref):
                place.read(ref, size)
    assert place.names() == set()


def test_a_large_payload_is_several_parts_and_none_is_left(place: Place) -> None:
    payload = os.urandom(2_500_000)
    ref = place.write("g7-a", payload)
    assert place.names() == {"g7-a.0", "g7-a.1", "g7-a.2"}
    assert b"".join(place.read(ref, 1 << 20, part) for part in range(3)) == payload
    assert place.read(ref, 10, part=1, offset=5) == payload[(1 << 20) + 5 : (1 << 20) + 15]
    place.age(ref, 300)
    batch = place.client.pipeline(transaction=False)
    place.store.refresh(ref, batch)
    batch.execute()
    assert place.store.sweep(set(), older_than_s=200) == 0, "every part was refreshed"
    place.age(ref, 300)
    assert place.store.sweep({ref}, older_than_s=200) == 0
    assert place.store.sweep(set(), older_than_s=200) == 3
    place.write("g7-a", payload)
    place.store.delete([ref])
    assert place.names() == set()


def test_segments_are_read_apart_from_the_ledger_on(place: Place, make_driver: Make) -> None:
    """Small segments in one part, a large one in parts of its own; what is read is verified, what is settled is gone."""
    driver = make_driver(groups_per_step=1, data_per_step=1)
    place = Place(place.kind, driver.client, driver.run, place.folder.parent)
    buffer = ReplayBuffer(driver.client, driver.run, BufferSettings(groups_per_step=1, data_per_step=1, part_bytes=1_500_000), place.store)
    epoch = buffer.rollback(0)
    segments = [b"head", os.urandom(4_000_000), os.urandom(1_000_000), b"tail"]
    assert buffer.commit(driver.take(), segments, [1.0, 2.0], 0)
    buffer.commit_data(buffer.lease_data("f", 0), [memoryview(b"row 0"), bytearray(b"row 1")])
    claim = buffer.claim(1, epoch, 0)
    group, data = claim.groups[0], claim.data[0]
    assert group.header.bytes == driver.count("bytes") - 10 == 5_000_008
    assert [bytes(found) for found in buffer.read(group)] == segments
    assert [bytes(found) for found in buffer.read(group, [3, 1])] == [segments[3], segments[1]]
    assert buffer.fetch(group) == b"".join(segments)
    assert buffer.read(data, [1]) == [b"row 1"]
    assert len(place.names()) == 6, "head; three of the large one; the next and the tail; the data"
    if place.kind == "redis":
        assert {place.client.pttl(place.prefix + name) for name in place.names()} == {-1}
        assert max(place.client.strlen(place.prefix + name) for name in place.names()) <= 1_500_000
    place.damage(group.ref.replace("+5", ".1"))
    with pytest.raises(PayloadCorrupt, match=r"part 1, .*the ledger says"):
        buffer.read(group, [1])
    assert buffer.read(group, [0, 2, 3]) == [segments[0], segments[2], segments[3]]
    buffer.publish(1, epoch)
    buffer.settle(1, epoch)
    assert place.names() == set()


@pytest.mark.parametrize("harm", ["damage", "shorten"])
def test_corruption_is_noticed(place: Place, make_driver: Make, harm: str) -> None:
    driver = make_driver(groups_per_step=1, data_per_step=1)
    place = Place(place.kind, driver.client, driver.run, place.folder.parent)
    buffer = ReplayBuffer(driver.client, driver.run, driver.buffer.settings, place.store)
    epoch = buffer.rollback(0)
    assert buffer.commit(driver.take(), b"group bytes", [1.0, 2.0], 0)
    buffer.commit_data(buffer.lease_data("f", 0), b"data bytes")
    claim = buffer.claim(1, epoch, 0)
    for item in (claim.groups[0], claim.data[0]):
        assert buffer.fetch(item)
        getattr(place, harm)(item.ref)
        with pytest.raises(PayloadCorrupt, match="the ledger says"):
            buffer.fetch(item)
        place.store.delete([item.ref])
        with pytest.raises(PayloadMissing):
            buffer.fetch(item)


def test_orphans_are_swept_and_nothing_else(place: Place) -> None:
    refs = [place.write(f"g{number}-a", b"x") for number in range(4)]
    old, young, referenced, waiting = refs
    for ref in (old, referenced, waiting):
        place.age(ref, 300)
    batch = place.client.pipeline(transaction=False)
    place.store.refresh(waiting, batch)
    batch.execute()
    assert place.store.sweep({referenced}, older_than_s=200) == 1
    assert place.names() == {young, referenced, waiting}
    assert place.store.sweep({referenced}, older_than_s=200) == 0


def test_a_run_stores_apart_from_others(place: Place) -> None:
    other = Place(place.kind, place.client, place.folder.name + "b", place.folder.parent)
    place.write("g0-a", b"mine")
    other.write("g0-a", b"theirs")
    assert other.store.clear() == 1
    assert place.read("g0-a", 4) == b"mine"
    assert place.store.clear() == 1
    assert place.store.clear() == 0


def test_what_cannot_be_stored_is_refused(client: redis.Redis, tmp_path: Path) -> None:
    with pytest.raises(ImpossibleSettings, match="one Redis value holds less"):
        BufferSettings(groups_per_step=1, part_bytes=512 << 20).check()
    with pytest.raises(ImpossibleSettings, match=r"replay\.max_bytes is .*free some disk"):
        FolderPayloads(tmp_path / "p").check(1 << 60)
    (tmp_path / "file").touch()
    with pytest.raises(ImpossibleSettings, match="cannot be written"):
        FolderPayloads(tmp_path / "file" / "p").check(1)
    with pytest.raises(ReplayError, match="without slashes"):
        make_payloads(str(tmp_path), client, "../up", SETTINGS)
