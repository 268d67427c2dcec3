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
from replay.payloads import FolderPayloads, PayloadStore, RedisPayloads, make_payloads, orphan_age_s

Make = Callable[..., Any]
SETTINGS = BufferSettings(groups_per_step=2, data_per_step=1, lease_s=100.0)


class Place:
    """A store and the ways a test reaches behind it."""

    def __init__(self, kind: str, client: redis.Redis, run: str, folder: Path) -> None:
        self.kind, self.client, self.folder = kind, client, folder / run
        self.prefix = f"ddrl:{{{run}}}:payload:"
        self.store: PayloadStore = make_payloads("redis" if kind == "redis" else str(folder), client, run, SETTINGS)

    def write(self, name: str, payload: bytes) -> str:
        batch = self.client.pipeline(transaction=False)
        ref = self.store.write(name, payload, batch)
        batch.execute()
        return ref

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
            self.client.pexpire(self.prefix + ref, int((orphan_age_s(SETTINGS) - seconds) * 1000))
            return
        now = self.folder.stat().st_mtime
        os.utime(self.folder / ref, (now - seconds, now - seconds))


@pytest.fixture(params=["redis", "folder"])
def place(request: pytest.FixtureRequest, client: redis.Redis, tmp_path: Path) -> Place:
    return Place(request.param, client, f"payloads-{secrets.token_hex(4)}", tmp_path)


def test_bytes_come_back_whole_and_go_once(place: Place) -> None:
    payloads = {f"g{size}-a": os.urandom(size) for size in (0, 1, 1000, 3_000_000)}
    refs = {name: place.write(name, payload) for name, payload in payloads.items()}
    assert {name: place.store.read(ref) for name, ref in refs.items()} == payloads
    place.write("g1-a", b"again")
    assert place.store.read(refs["g1-a"]) == b"again", "a commit that is repeated writes again"
    place.store.delete(list(refs.values()))
    place.store.delete(list(refs.values()))
    place.store.delete([])
    for ref in refs.values():
        with pytest.raises(PayloadMissing, match=ref):
            place.store.read(ref)
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
    assert place.store.read("g0-a") == b"mine"
    assert place.store.clear() == 1
    assert place.store.clear() == 0


def test_what_cannot_be_stored_is_refused(client: redis.Redis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RedisPayloads, "LARGEST", 10)
    with pytest.raises(ReplayError, match=r"set replay\.payloads to a shared folder"):
        RedisPayloads(client, "r").write("g0-a", b"x" * 10, client.pipeline(transaction=False))
    with pytest.raises(ImpossibleSettings, match=r"replay\.max_bytes is .*free some disk"):
        FolderPayloads(tmp_path / "p").check(1 << 60)
    (tmp_path / "file").touch()
    with pytest.raises(ImpossibleSettings, match="cannot be written"):
        FolderPayloads(tmp_path / "file" / "p").check(1)
    with pytest.raises(ReplayError, match="without slashes"):
        make_payloads(str(tmp_path), client, "../up", SETTINGS)
