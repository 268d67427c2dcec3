"""Jobs that outlive the process that took them: payload, state and answer in Redis, moved by the scripts of ``services/jobs/lua``.

Lifecycle: ``submit`` → queued → ``claim`` → running → ``finish`` → succeeded | failed. Besides: ``cancel`` → cancelled,
``release`` → queued again (the reward was busy), and expired when a job did not end in ``ttl_s``, or its answer was kept for
``ttl_s`` and is gone. A claim is a lease: who stops renewing it (a killed process) loses the job to the next claimer, and
``finish`` of the former holder changes nothing. Invariants: every accepted job ends; it ends once; nothing about it stays in
Redis for ever; payloads and answers are the bytes of requests and responses, never pickles.

This is the one module of the room that knows Redis.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import secrets
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast, get_args

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from services.errors import ProblemError
from services.jobs.config import JobsConfig
from services.jobs.tasks import ended
from services.rest.idempotency import Kept, in_progress, mismatch

logger = logging.getLogger(__name__)

JobState = Literal["queued", "running", "succeeded", "failed", "expired", "cancelled"]
# Commands wait for one fail-over or restart of the server, not for ever.
SOCKET_TIMEOUT_S, RETRIES = 5.0, 6


class JobStoreError(RuntimeError):
    """Redis did not do what was asked; the message names the server without its password."""


class JobsFull(RuntimeError):
    """Too many unfinished jobs, or too many bytes of them."""


class JobConflict(RuntimeError):
    """An idempotency key came again with another body."""


@dataclass(frozen=True)
class Job:
    """What is known of a job. Times are seconds since the epoch by Redis' clock; ``answer`` and ``problem`` are JSON."""

    id: str
    state: JobState
    kind: str
    meta: dict[str, str]
    created_at: float
    expires_at: float
    attempts: int
    finished_at: float | None = None
    answer: bytes | None = None
    problem: bytes | None = None


@dataclass(frozen=True)
class Claim:
    """A job in our hands until the lease ends; ``left_s`` is its time until it expires, ``tries`` how often it was begun in vain."""

    id: str
    token: str
    kind: str
    meta: dict[str, str]
    payload: bytes
    left_s: float
    tries: int


class JobStore:
    """The jobs of one fleet. Safe to use from several tasks of one event loop; any number of processes may share the server."""

    def __init__(self, url: str, config: JobsConfig, prefix: str = "ddrl:{jobs}:") -> None:
        self._config = config
        self._redis = _Scripts(url, prefix, ("submit", "claim", "renew", "finish", "release", "cancel", "read", "counts"))
        self._run = self._redis.run

    @property
    def config(self) -> JobsConfig:
        """The settings of the store."""
        return self._config

    async def submit(self, kind: str, meta: dict[str, str], payload: bytes, once: tuple[str, str] | None = None) -> tuple[str, bool]:
        """Store a job; returns its id and whether it is new.

        ``once`` is an idempotency key and a digest of the request: the key of an earlier job gives that job's id, if the
        digest is the same. Raises ``JobsFull``, ``JobConflict``, ``JobStoreError``.
        """
        c = self._config
        key, digest = once or ("", "")
        name = _digest(key) if key else ""
        reply = await self._run("submit", secrets.token_hex(16), kind, json.dumps(meta), payload, *self._times(), c.max_unfinished, c.max_bytes, name, digest)
        outcome = reply[0].decode()
        if outcome == "full":
            raise JobsFull(f"{reply[1]} jobs have not ended; at most {c.max_unfinished} jobs and {c.max_bytes} bytes may wait")
        if outcome == "conflict":
            raise JobConflict("the idempotency key came with another request before")
        return reply[1].decode(), outcome == "new"

    async def get(self, job_id: str) -> Job | None:
        """The job, with its answer if it has one; None when it is unknown or long forgotten."""
        reply = await self._run("read", job_id)
        if reply is None:
            return None
        now, answer, fields = int(reply[0]), reply[1], dict(zip((f.decode() for f in reply[2::2]), reply[3::2], strict=True))
        state, expires = cast(JobState, fields["state"].decode()), int(fields["expires"])
        assert state in get_args(JobState), state
        return Job(
            id=job_id,
            state="expired" if now >= expires else state,
            kind=fields["kind"].decode(),
            meta=json.loads(fields["meta"]),
            created_at=int(fields["created"]) / 1000,
            expires_at=expires / 1000,
            attempts=int(fields["attempts"]),
            finished_at=int(fields["finished"]) / 1000 if "finished" in fields else None,
            answer=answer,
            problem=fields["problem"] or None,
        )

    async def claim(self, lost_problem: bytes) -> Claim | None:
        """Take the job that has waited longest, or None. A job whose holders were lost too often ends with ``lost_problem``."""
        c, token = self._config, secrets.token_hex(8)
        reply = await self._run("claim", token, int(c.lease_s * 1000), c.max_tries, lost_problem, *self._times())
        if reply is None:
            return None
        job_id, kind, meta, payload, left, tries = reply
        return Claim(job_id.decode(), token, kind.decode(), json.loads(meta), payload, left / 1000, tries)

    async def renew(self, claim: Claim) -> bool:
        """Hold the job for another lease; False when it is no longer ours."""
        return bool(await self._run("renew", claim.id, claim.token, int(self._config.lease_s * 1000)))

    async def finish(self, claim: Claim, state: Literal["succeeded", "failed"], answer: bytes = b"", problem: bytes = b"") -> bool:
        """End the job; False when it is no longer ours, and then nothing changed."""
        return bool(await self._run("finish", claim.id, claim.token, state, answer, problem, *self._times()))

    async def release(self, claim: Claim, delay_s: float, counted: bool) -> bool:
        """Give the job back, to be claimed after ``delay_s``, as a try or not; False when it is no longer ours."""
        return bool(await self._run("release", claim.id, claim.token, int(delay_s * 1000), int(counted)))

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended; False when it had, or is not known."""
        return bool(await self._run("cancel", job_id, *self._times()))

    async def counts(self) -> dict[str, int]:
        """Queued and running jobs, and the bytes they hold."""
        queued, running, size = await self._run("counts")
        return {"queued": queued, "running": running, "bytes": size}

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.close()

    def _times(self) -> tuple[int, int]:
        return int(self._config.ttl_s * 1000), int(self._config.tombstone_s * 1000)


class RedisIdempotency:
    """``IdempotencyStore`` that all ingress processes share and that outlives them.

    A key that is being worked on is a lease, renewed by its process: a killed process frees its keys within ``LEASE_S``.
    """

    LEASE_S = 15.0

    def __init__(self, url: str, ttl_s: float, max_bytes: int, prefix: str = "ddrl:{idempotency}:") -> None:
        self._redis = _Scripts(url, prefix, ("idempotency_begin", "idempotency_end"))
        self._ttl_s, self._max_bytes = ttl_s, max_bytes
        self._running: dict[str, str] = {}
        self._renewal: asyncio.Task[None] | None = None

    async def begin(self, owner: str, key: str, fingerprint: str) -> Kept | None:
        """See ``IdempotencyStore``."""
        name = _digest(f"{owner} {key}")
        try:
            reply = await self._redis.run("idempotency_begin", name, fingerprint, int(self.LEASE_S * 1000))
        except JobStoreError as error:
            logger.warning("idempotency keys: %s", error)
            raise ProblemError(503, "idempotency_unavailable", "the Redis of the idempotency keys does not answer", retry_after_s=5) from error
        if reply[0] == b"mismatch":
            raise mismatch()
        if reply[0] == b"running":
            raise in_progress()
        if reply[0] == b"kept":
            return Kept(reply[1], reply[2].decode())
        self._running[name] = fingerprint
        if self._renewal is None or self._renewal.done():
            self._renewal = asyncio.get_running_loop().create_task(self._renew())
        return None

    async def finish(self, owner: str, key: str, fingerprint: str, answer: Kept) -> None:
        """See ``IdempotencyStore``. An answer larger than ``max_bytes`` is not kept."""
        if len(answer.body) > self._max_bytes:
            await self.abandon(owner, key, fingerprint)
        else:
            await self._end(_digest(f"{owner} {key}"), fingerprint, int(self._ttl_s * 1000), answer.body, answer.media_type)

    async def abandon(self, owner: str, key: str, fingerprint: str) -> None:
        """See ``IdempotencyStore``."""
        await self._end(_digest(f"{owner} {key}"), fingerprint, 0, b"", "")

    async def close(self) -> None:
        """Close the connections; keys being worked on are free again when their leases end."""
        if self._renewal is not None:
            await ended(self._renewal)
        await self._redis.close()

    async def _end(self, name: str, fingerprint: str, ttl_ms: int, body: bytes, media_type: str) -> None:
        """The request is answered whatever Redis says now, so its refusal only shortens what a repeat gets."""
        self._running.pop(name, None)
        try:
            await self._redis.run("idempotency_end", name, fingerprint, ttl_ms, body, media_type)
        except JobStoreError as error:
            logger.warning("idempotency keys: %s", error)

    async def _renew(self) -> None:
        while self._running:
            await asyncio.sleep(self.LEASE_S / 3)
            for name, fingerprint in list(self._running.items()):
                try:
                    await self._redis.run("idempotency_end", name, fingerprint, int(self.LEASE_S * 1000), b"", "")
                except JobStoreError as error:
                    logger.warning("idempotency keys: %s", error)


class _Scripts:
    """A connection and the scripts bound to one key prefix; whatever goes wrong is a ``JobStoreError``."""

    def __init__(self, url: str, prefix: str, names: tuple[str, ...]) -> None:
        retry = Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), RETRIES, (ConnectionError, TimeoutError))
        try:
            self._redis: Redis = Redis.from_url(url, protocol=2, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S, retry=retry)
        except ValueError as error:
            raise JobStoreError(f"the Redis URL cannot be used: {error}") from None
        where = self._redis.connection_pool.connection_kwargs
        self._where = where.get("path") or f"{where.get('host', '?')}:{where.get('port', '?')}"
        self._prefix = prefix
        folder = resources.files("services.jobs") / "lua"
        common = (folder / "common.lua").read_text()
        self._scripts = {name: self._redis.register_script(common + (folder / f"{name}.lua").read_text()) for name in names}

    async def run(self, script: str, *args: Any) -> Any:
        """The script's reply."""
        try:
            return await self._scripts[script](keys=[self._prefix], args=args)
        except RedisError as error:
            raise JobStoreError(f"Redis at {self._where}: {' '.join(str(error).split()) or type(error).__name__}") from None

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
