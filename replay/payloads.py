"""Where payload bytes live: Redis by default, a shared folder for video.

Lifecycle: `write` (before the ledger knows) → the ledger adopts the reference → `read` by learner ranks → the
ledger drops the reference into its trash → `delete`. Invariant: a reference in the ledger always names
complete bytes, and bytes the ledger never adopted go away by themselves (expiry in Redis, `sweep` in a
folder).

Payloads are opaque bytes (safetensors, by the caller's choice), never pickles.
"""

import os
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from pathlib import Path

import redis
import xxhash
from redis.client import Pipeline

from replay.errors import PayloadMissing, ReplayError


def checksum(payload: bytes) -> str:
    """xxh3-64 of the bytes as 16 hex digits: guards against corruption, not against an adversary."""
    return xxhash.xxh3_64_hexdigest(payload)


class PayloadStore(ABC):
    """Bytes under a reference string. References are made by `write` and opaque to everyone else."""

    @abstractmethod
    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        """Store `payload` under the unique `name`; returns the reference.

        The bytes must be in place before any command queued on `batch` afterwards runs: Redis payloads queue
        their own write on it (one round trip with the ledger entry), other stores write at once.
        """

    @abstractmethod
    def read(self, ref: str) -> bytes:
        """The bytes; raises `PayloadMissing`."""

    @abstractmethod
    def delete(self, refs: Sequence[str]) -> None:
        """Remove; references already gone are fine."""

    @abstractmethod
    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        """Remove bytes that no reference in `keep` names and that are older; returns their number."""

    def redis_key(self, ref: str) -> str:
        """The key the ledger's scripts may check and persist; '' when the bytes are outside its server."""
        return ""


class RedisPayloads(PayloadStore):
    """Payloads as plain Redis strings beside the ledger. A value is limited to 512 MB by Redis."""

    LARGEST = 512 << 20

    def __init__(self, client: redis.Redis, run: str, orphan_ttl_s: float = 3600.0) -> None:
        """`orphan_ttl_s`: how long bytes live that no commit adopts; longer than any pause between."""
        self._client = client
        self._prefix = f"ddrl:{{{run}}}:payload:"
        self._ttl_ms = int(orphan_ttl_s * 1000)

    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        if len(payload) >= self.LARGEST:
            raise ReplayError(f"payload {name} has {len(payload)} bytes; one Redis value holds less than {self.LARGEST}: use a shared-folder payload store")
        batch.set(self._prefix + name, payload, px=self._ttl_ms)
        return name

    def read(self, ref: str) -> bytes:
        payload = self._client.get(self._prefix + ref)
        if not isinstance(payload, bytes):
            raise PayloadMissing(f"payload {ref} is not in Redis")
        return payload

    def delete(self, refs: Sequence[str]) -> None:
        if refs:
            self._client.unlink(*(self._prefix + ref for ref in refs))

    def sweep(self, keep: Collection[str], older_than_s: float) -> int:
        return 0  # unadopted bytes carry an expiry

    def redis_key(self, ref: str) -> str:
        return self._prefix + ref


class FolderPayloads(PayloadStore):
    """Payloads as files in a folder all nodes share. Written to a temporary name, synced, then renamed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, payload: bytes, batch: Pipeline) -> str:
        draft = self._folder / f"{name}.{secrets.token_hex(4)}.tmp"
        with draft.open("xb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        draft.rename(self._folder / name)
        return name

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
        oldest = time.time() - older_than_s
        for file in self._folder.iterdir():
            if file.name in keep:
                continue
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()
                    swept += 1
            except FileNotFoundError:  # another sweeper was faster
                continue
        return swept
