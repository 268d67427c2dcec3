"""``Idempotency-Key``: the same request sent again gets the answer that was given, byte for byte.

Lifecycle of a key: absent → ``begin`` (running) → ``finish`` (answered, kept for a while) or ``abandon`` (absent again).
A key that is running is refused with 409, one that came with another request with 422. Keys belong to the caller's
API key, so nobody can fetch another's answer. Only complete answers are kept: one with a retryable failure is not.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Protocol

from services.errors import ProblemError

Owned = tuple[str, str]  # (owner, key)


@dataclass(frozen=True)
class Kept:
    """An answer to give again."""

    body: bytes
    media_type: str


class IdempotencyStore(Protocol):
    """Where answers are kept. ``fingerprint`` is a digest of the request."""

    async def begin(self, owner: str, key: str, fingerprint: str) -> Kept | None:
        """The kept answer, or None: the caller works and then calls ``finish`` or ``abandon``. Raises ``ProblemError``."""
        ...

    async def finish(self, owner: str, key: str, fingerprint: str, answer: Kept) -> None:
        """Keep ``answer`` for the next request with this key."""
        ...

    async def abandon(self, owner: str, key: str, fingerprint: str) -> None:
        """Forget that the key was running."""
        ...


@dataclass(frozen=True)
class Answer:
    """What a request came to: ``complete`` answers are kept; one that may turn out better when asked again is not."""

    kept: Kept
    complete: bool


async def once(store: IdempotencyStore, owner: str, key: str | None, fingerprint: str, work: Callable[[], Awaitable[Answer]]) -> tuple[Kept, bool]:
    """The answer of ``work``, or the kept one of an earlier request (then True). Without a ``key`` just the work."""
    if key is None:
        return (await work()).kept, False
    kept = await store.begin(owner, key, fingerprint)
    if kept is not None:
        return kept, True
    try:
        answer = await work()
    except BaseException:
        await store.abandon(owner, key, fingerprint)
        raise
    if answer.complete:
        await store.finish(owner, key, fingerprint, answer.kept)
    else:
        await store.abandon(owner, key, fingerprint)
    return answer.kept, False


def mismatch() -> ProblemError:
    """The key came with another request before."""
    return ProblemError(422, "idempotency_mismatch", "this Idempotency-Key was used with another request")


def in_progress() -> ProblemError:
    """The first request with this key has no answer yet."""
    return ProblemError(409, "idempotency_in_progress", "a request with this Idempotency-Key is being worked on", retry_after_s=1)


class MemoryIdempotency:
    """Answers in this process, bounded in age and bytes; the oldest make room. For one ingress process without Redis."""

    def __init__(self, ttl_s: float, max_bytes: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._ttl_s, self._max_bytes, self._clock = ttl_s, max_bytes, clock
        self._running: dict[Owned, str] = {}
        self._kept: OrderedDict[Owned, tuple[float, str, Kept]] = OrderedDict()
        self._bytes = 0
        self._lock = asyncio.Lock()

    async def begin(self, owner: str, key: str, fingerprint: str) -> Kept | None:
        """See ``IdempotencyStore``."""
        async with self._lock:
            self._expire()
            if (owner, key) in self._running:
                raise in_progress() if self._running[owner, key] == fingerprint else mismatch()
            if (owner, key) in self._kept:
                _, known, answer = self._kept[owner, key]
                if known != fingerprint:
                    raise mismatch()
                return answer
            self._running[owner, key] = fingerprint
            return None

    async def finish(self, owner: str, key: str, fingerprint: str, answer: Kept) -> None:
        """See ``IdempotencyStore``. An answer larger than the whole store is not kept."""
        async with self._lock:
            self._running.pop((owner, key), None)
            if len(answer.body) > self._max_bytes:
                return
            self._drop((owner, key))
            self._kept[owner, key] = (self._clock() + self._ttl_s, fingerprint, answer)
            self._bytes += len(answer.body)
            while self._bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    async def abandon(self, owner: str, key: str, fingerprint: str) -> None:
        """See ``IdempotencyStore``."""
        async with self._lock:
            if self._running.get((owner, key)) == fingerprint:
                del self._running[owner, key]

    def _expire(self) -> None:
        now = self._clock()
        while self._kept and next(iter(self._kept.values()))[0] <= now:
            self._drop(next(iter(self._kept)))

    def _drop(self, owned: Owned) -> None:
        if owned in self._kept:
            self._bytes -= len(self._kept.pop(owned)[2].body)
