"""Where payload bytes live: Redis by default, a shared folder for video.

Lifecycle: `write` (before the ledger knows) → the ledger adopts the reference → `read` by learner ranks → the
ledger drops the reference into its trash → `delete`. Invariant: a reference in the ledger always names
complete bytes, and bytes the ledger never adopted go away by themselves (expiry in Redis, `sweep` in a
folder).

A payload is stored in parts (see `replay.layout`), each a Redis value or a file. Parts are opaque bytes (the caller's
choice), never pickles.
"""

import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import redis
from redis.client import Pipeline

from replay.connect import surfaced
from replay.errors import ImpossibleSettings, PayloadMissing, ReplayError
from replay.keys import key_prefix, own_keys
from replay.layout import Buffer, part_names, reference
from replay.policy import BufferSettings, megabytes

IN_REDIS = "redis"
# Bytes that no commit adopted are orphans when they are this many leases old, and this many seconds at least.
ORPHAN_LEASES = 4
ORPHAN_LEAST_S = 600.0
TOGETHER_BYTES = 8 << 20
"""Most bytes of a payload that wait to be sent to Redis together with its ledger entry."""


def orphan_age_s(settings: BufferSettings) -> float:
    """Age at which bytes outside the ledger are nobody's: longer than any pause between write and commit."""
    return max(ORPHAN_LEAST_S, ORPHAN_LEASES * settings.lease_s)


def make_payloads(place: str, client: redis.Redis, run: str, settings: BufferSettings) -> "PayloadStore":
    """The store that `replay.payloads` names: 'redis', or a shared folder, in which the run gets its own."""
    if place == IN_REDIS:
        return RedisPayloads(client, run, orphan_age_s(settings))
    if Path(run).name != run:
        raise ReplayError(f"run name {run!r} cannot name a folder: choose one without slashes")
    return FolderPayloads(Path(place).expanduser().resolve() / run)


class PayloadStore(ABC):
    """Bytes under a reference string. References are made by `write` and opaque to everyone else."""

    place: str
    """'redis', or the folder: what `attach` needs to find the bytes again."""

    @abstractmethod
    def write(self, name: str, parts: Sequence[Sequence[Buffer]], batch: Pipeline) -> str:
        """Store `parts`, each given in pieces, under the unique `name`; returns the reference.

        The bytes must be in place before any command queued on `batch` afterwards runs: small Redis payloads queue
        their own write on it (one round trip with the ledger entry), others are written at once, part by part; the pieces
        of a part are let go before the next ones are asked for.
        """

    @abstractmethod
    def refresh(self, ref: str, batch: Pipeline) -> None:
        """Bytes that wait to be adopted are not orphans: their age counts from now. May queue on `batch`."""

    @abstractmethod
    def read(self, ref: str, part: int, offset: int, into: memoryview) -> int:
        """Fill `into` from `offset` of a part on; returns how many bytes there were. Thread-safe. Raises `PayloadMissing`."""

    @abstractmethod
    def delete(self, refs: Sequence[str]) -> None:
        """Remove; references already gone are fine."""

    @abstractmethod
    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        """Remove parts that no reference in `keep` names and that are older; returns their number."""

    @abstractmethod
    def clear(self) -> int:
        """Remove everything this run stored; returns the number of parts."""

    def check(self, max_bytes: int) -> None:
        """Raise `ImpossibleSettings` when `max_bytes` of payloads cannot be stored (Redis: `check_server` looks)."""
        return

    def redis_keys(self, ref: str) -> list[str]:
        """The keys of its parts, which the ledger's scripts check and persist; none when they are outside its server."""
        return []


class RedisPayloads(PayloadStore):
    """Parts as plain Redis strings beside the ledger."""

    place = IN_REDIS

    def __init__(self, client: redis.Redis, run: str, orphan_ttl_s: float = 3600.0) -> None:
        """`orphan_ttl_s`: how long bytes live that no commit adopts; longer than any pause between."""
        self._client = client
        self._prefix = key_prefix(run) + "payload:"
        self._ttl_ms = int(orphan_ttl_s * 1000)

    def write(self, name: str, parts: Sequence[Sequence[Buffer]], batch: Pipeline) -> str:
        ref, queued = reference(name, len(parts)), 0
        for number, key in enumerate(self.redis_keys(ref)):
            pieces = parts[number]
            value = pieces[0] if len(pieces) == 1 else b"".join(pieces)
            if queued + len(value) <= TOGETHER_BYTES:
                batch.set(key, value, px=self._ttl_ms)
                queued += len(value)
            elif not self._set(key, value):
                return ref  # the ledger will find that the rest is not there
            del pieces, value
        return ref

    def _set(self, key: str, value: Buffer) -> bool:
        """Write a part by itself. False: the server is at its memory limit."""
        with surfaced(self._client):
            try:
                self._client.set(key, value, px=self._ttl_ms)
            except redis.ResponseError as error:
                if "maxmemory" in str(error):
                    return False
                raise
        return True

    def refresh(self, ref: str, batch: Pipeline) -> None:
        for key in self.redis_keys(ref):
            batch.pexpire(key, self._ttl_ms)

    def read(self, ref: str, part: int, offset: int, into: memoryview) -> int:
        key = self.redis_keys(ref)[part]
        found: Any = self._client.getrange(key, offset, offset + len(into) - 1) if into else b""
        short = len(found) < len(into) or not into  # as the range of a key that is not there
        if short and not self._client.exists(key):
            raise PayloadMissing(f"payload {ref} is not in Redis: {key} is gone")
        into[: len(found)] = found
        return len(found)

    def delete(self, refs: Sequence[str]) -> None:
        if refs:
            self._client.unlink(*(key for ref in refs for key in self.redis_keys(ref)))

    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        """Unadopted bytes carry an expiry and go by themselves; this only hastens it."""
        swept, kept = 0, _names(keep)
        for key in own_keys(self._client, self._prefix):
            if key.removeprefix(self._prefix) in kept:
                continue
            left_ms = int(self._client.pttl(key))  # -1: adopted, -2: gone
            if left_ms >= 0 and self._ttl_ms - left_ms > older_than_s * 1000:
                swept += int(self._client.unlink(key))
        return swept

    def clear(self) -> int:
        return sum(int(self._client.unlink(key)) for key in own_keys(self._client, self._prefix))

    def redis_keys(self, ref: str) -> list[str]:
        return [self._prefix + name for name in part_names(ref)]


class FolderPayloads(PayloadStore):
    """Parts as files in a folder all nodes share, of this run alone. Written to a temporary name, synced, then renamed."""

    _NAME = re.compile(r"[gd]\d+-[0-9a-zA-Z]+(\.\d+)?(\.[0-9a-f]+\.tmp)?")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.place = str(folder)

    def write(self, name: str, parts: Sequence[Sequence[Buffer]], batch: Pipeline) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        ref = reference(name, len(parts))
        for number, part in enumerate(part_names(ref)):
            draft = self._folder / f"{part}.{secrets.token_hex(4)}.tmp"
            with draft.open("xb", buffering=0) as file:
                for piece in parts[number]:
                    _write_all(file.fileno(), memoryview(piece))
                    del piece
                os.fsync(file.fileno())
            draft.rename(self._folder / part)
        return ref

    def refresh(self, ref: str, batch: Pipeline) -> None:
        try:
            for part in part_names(ref):
                os.utime(self._folder / part)
        except FileNotFoundError:
            raise PayloadMissing(f"payload {ref} has vanished from {self._folder} before it was committed") from None

    def read(self, ref: str, part: int, offset: int, into: memoryview) -> int:
        try:
            with (self._folder / part_names(ref)[part]).open("rb", buffering=0) as file:
                held = 0
                while held < len(into):  # a read may return less than it was asked for
                    got = os.preadv(file.fileno(), [into[held:]], offset + held)
                    if got == 0:
                        break
                    held += got
                return held
        except FileNotFoundError:
            raise PayloadMissing(f"payload {ref} is not in {self._folder}: {part_names(ref)[part]} is gone") from None

    def delete(self, refs: Sequence[str]) -> None:
        for ref in refs:
            for part in part_names(ref):
                (self._folder / part).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        swept, kept = 0, _names(keep)
        oldest = self._now() - older_than_s
        for file in self._files():
            if file.name in kept:
                continue
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()
                    swept += 1
            except FileNotFoundError:  # another sweeper was faster
                continue
        return swept

    def clear(self) -> int:
        files = self._files()
        for file in files:
            file.unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()
        return len(files)

    def check(self, max_bytes: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._now()
        except OSError as error:
            raise ImpossibleSettings(f"replay.payloads: {self._folder} cannot be written ({error.strerror}); give a folder that all nodes share") from None
        free = shutil.disk_usage(self._folder).free + sum(map(_size, self._files()))
        if free < max_bytes:
            raise ImpossibleSettings(
                f"{self._folder} has {megabytes(free)} for payloads, replay.max_bytes is {megabytes(max_bytes)}: free some disk or lower replay.max_bytes"
            )

    def _files(self) -> list[Path]:
        """Finished parts and drafts; whatever else lies in the folder is not ours."""
        if not self._folder.is_dir():
            return []
        return [file for file in self._folder.iterdir() if self._NAME.fullmatch(file.name)]

    def _now(self) -> float:
        """The time by the clock that stamps the files: on a shared file system that of its server."""
        if not self._folder.is_dir():
            return time.time()
        probe = self._folder / f".clock-{secrets.token_hex(4)}"
        probe.touch()
        try:
            return probe.stat().st_mtime
        finally:
            probe.unlink()


def _names(refs: Collection[str]) -> set[str]:
    return {name for ref in refs for name in part_names(ref)}


def _write_all(file: int, piece: memoryview) -> None:
    """A write may take less than it is given (2 GB at most)."""
    while piece:
        piece = piece[os.write(file, piece) :]


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # deleted meanwhile
        return 0
