"""Where payload bytes live: Redis by default, a shared folder for video.

Lifecycle: `write` (before the ledger knows) → the ledger adopts the reference → `read` by learner ranks → the
ledger drops the reference into its trash → `delete`. Invariant: a reference in the ledger always names
complete bytes, and bytes the ledger never adopted go away by themselves (expiry in Redis, `sweep` in a
folder).

Payloads are opaque bytes (safetensors, by the caller's choice), never pickles.
"""

import os
import re
import secrets
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

import redis
import xxhash
from redis.client import Pipeline

from replay.errors import ImpossibleSettings, PayloadMissing, ReplayError
from replay.keys import key_prefix, own_keys
from replay.policy import BufferSettings, megabytes

IN_REDIS = "redis"
# Bytes that no commit adopted are orphans when they are this many leases old, and this many seconds at least.
ORPHAN_LEASES = 4
ORPHAN_LEAST_S = 600.0


def checksum(payload: bytes) -> str:
    """xxh3-64 of the bytes as 16 hex digits: guards against corruption, not against an adversary."""
    return xxhash.xxh3_64_hexdigest(payload)


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
    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        """Store `payload` under the unique `name`; returns the reference.

        The bytes must be in place before any command queued on `batch` afterwards runs: Redis payloads queue
        their own write on it (one round trip with the ledger entry), other stores write at once.
        """

    @abstractmethod
    def refresh(self, ref: str, batch: Pipeline) -> None:
        """Bytes that wait to be adopted are not orphans: their age counts from now. May queue on `batch`."""

    @abstractmethod
    def read(self, ref: str) -> bytes:
        """The bytes; raises `PayloadMissing`."""

    @abstractmethod
    def delete(self, refs: Sequence[str]) -> None:
        """Remove; references already gone are fine."""

    @abstractmethod
    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        """Remove bytes that no reference in `keep` names and that are older; returns their number."""

    @abstractmethod
    def clear(self) -> int:
        """Remove everything this run stored; returns the number of payloads."""

    def check(self, max_bytes: int) -> None:
        """Raise `ImpossibleSettings` when `max_bytes` of payloads cannot be stored (Redis: `check_server` looks)."""
        return

    def redis_key(self, ref: str) -> str:
        """The key the ledger's scripts may check and persist; '' when the bytes are outside its server."""
        return ""


class RedisPayloads(PayloadStore):
    """Payloads as plain Redis strings beside the ledger. A value is limited to 512 MB by Redis."""

    LARGEST = 512 << 20
    place = IN_REDIS

    def __init__(self, client: redis.Redis, run: str, orphan_ttl_s: float = 3600.0) -> None:
        """`orphan_ttl_s`: how long bytes live that no commit adopts; longer than any pause between."""
        self._client = client
        self._prefix = key_prefix(run) + "payload:"
        self._ttl_ms = int(orphan_ttl_s * 1000)

    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        if len(payload) >= self.LARGEST:
            raise ReplayError(
                f"payload {name} has {len(payload)} bytes; one Redis value holds less than {self.LARGEST}: set replay.payloads to a shared folder"
            )
        batch.set(self._prefix + name, payload, px=self._ttl_ms)
        return name

    def refresh(self, ref: str, batch: Pipeline) -> None:
        batch.pexpire(self._prefix + ref, self._ttl_ms)

    def read(self, ref: str) -> bytes:
        payload = self._client.get(self._prefix + ref)
        if not isinstance(payload, bytes):
            raise PayloadMissing(f"payload {ref} is not in Redis")
        return payload

    def delete(self, refs: Sequence[str]) -> None:
        if refs:
            self._client.unlink(*(self._prefix + ref for ref in refs))

    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        """Unadopted bytes carry an expiry and go by themselves; this only hastens it."""
        swept = 0
        for key in own_keys(self._client, self._prefix):
            if key.removeprefix(self._prefix) in keep:
                continue
            left_ms = int(self._client.pttl(key))  # -1: adopted, -2: gone
            if left_ms >= 0 and self._ttl_ms - left_ms > older_than_s * 1000:
                swept += int(self._client.unlink(key))
        return swept

    def clear(self) -> int:
        return sum(int(self._client.unlink(key)) for key in own_keys(self._client, self._prefix))

    def redis_key(self, ref: str) -> str:
        return self._prefix + ref


class FolderPayloads(PayloadStore):
    """Payloads as files in a folder all nodes share, of this run alone. Written to a temporary name, synced, then renamed."""

    _NAME = re.compile(r"[gd]\d+-[0-9a-zA-Z]+(\.[0-9a-f]+\.tmp)?")

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.place = str(folder)

    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        self._folder.mkdir(parents=True, exist_ok=True)
        draft = self._folder / f"{name}.{secrets.token_hex(4)}.tmp"
        with draft.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._folder / name)
        return name

    def refresh(self, ref: str, batch: Pipeline) -> None:
        try:
            os.utime(self._folder / ref)
        except FileNotFoundError:
            raise PayloadMissing(f"payload {ref} has vanished from {self._folder} before it was committed") from None

    def read(self, ref: str) -> bytes:
        try:
            return (self._folder / ref).read_bytes()
        except FileNotFoundError:
            raise PayloadMissing(f"payload {ref} is not in {self._folder}") from None

    def delete(self, refs: Sequence[str]) -> None:
        for ref in refs:
            (self._folder / ref).unlink(missing_ok=True)

    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        swept = 0
        oldest = self._now() - older_than_s
        for file in self._files():
            if file.name in keep:
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
        """Finished payloads and drafts; whatever else lies in the folder is not ours."""
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


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except FileNotFoundError:  # deleted meanwhile
        return 0
