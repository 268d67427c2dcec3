"""Jobs that outlive the process that took them: payload, state and answer in Redis, moved by the scripts of ``services/lua``.

Lifecycle: ``submit`` → queued → ``claim`` → running → ``finish`` → succeeded | failed. Besides: ``cancel`` → cancelled,
``release`` → queued again (the reward was busy), and expired when a job did not end in ``ttl_s``, or its answer was kept for
``ttl_s`` and is gone. A claim is a lease: who stops renewing it (a killed process) loses the job to the next claimer, and
``finish`` of the former holder changes nothing. Invariants: every accepted job ends; it ends once; nothing about it stays in
Redis for ever; payloads and answers are the bytes of requests and responses, never pickles.

This is the one module of the room that knows Redis.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from dataclasses import dataclass
from importlib import resources
from typing import Any, Literal, cast, get_args

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ConnectionError, RedisError, TimeoutError

from services.config import JobsConfig

JobState = Literal["queued", "running", "succeeded", "failed", "expired", "cancelled"]
FINAL: tuple[JobState, ...] = ("succeeded", "failed", "expired", "cancelled")
PREFIX = "ddrl:{jobs}:"
SCRIPTS = ("submit", "claim", "renew", "finish", "release", "cancel", "read")
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
    created_at: float
    expires_at: float
    attempts: int
    finished_at: float | None = None
    answer: bytes | None = None
    problem: bytes | None = None


@dataclass(frozen=True)
class Claim:
    """A job in our hands until the lease ends; ``left_s`` is its time until it expires."""

    id: str
    token: str
    kind: str
    meta: dict[str, str]
    payload: bytes
    left_s: float


class JobStore:
    """The jobs of one fleet. Safe to use from several tasks of one event loop; any number of processes may share the server."""

    def __init__(self, url: str, config: JobsConfig, prefix: str = PREFIX) -> None:
        self._config, self._prefix = config, prefix
        retry = Retry(ExponentialWithJitterBackoff(cap=1.0, base=0.05), RETRIES, (ConnectionError, TimeoutError))
        try:
            self._redis: Redis = Redis.from_url(url, protocol=2, socket_timeout=SOCKET_TIMEOUT_S, socket_connect_timeout=SOCKET_TIMEOUT_S, retry=retry)
        except ValueError as error:
            raise JobStoreError(f"the Redis URL of the jobs cannot be used: {error}") from None
        where = self._redis.connection_pool.connection_kwargs
        self._where = where.get("path") or f"{where.get('host', '?')}:{where.get('port', '?')}"
        folder = resources.files("services") / "lua"
        common = (folder / "common.lua").read_text()
        self._scripts = {name: self._redis.register_script(common + (folder / f"{name}.lua").read_text()) for name in SCRIPTS}

    @property
    def config(self) -> JobsConfig:
        """The settings of the store."""
        return self._config

    async def submit(self, kind: str, meta: dict[str, str], payload: bytes, idempotency_key: str | None = None) -> tuple[str, bool]:
        """Store a job; returns its id and whether it is new (False: the idempotency key was known, nothing was added).

        A repeated submission after a lost reply may leave a second job, unless an idempotency key says that it is the
        same. Raises ``JobsFull``, ``JobConflict``, ``JobStoreError``.
        """
        c = self._config
        mark = hashlib.sha256(json.dumps([kind, meta], sort_keys=True).encode() + payload).hexdigest()
        name = hashlib.sha256(idempotency_key.encode()).hexdigest() if idempotency_key else ""
        reply = await self._run("submit", secrets.token_hex(16), kind, json.dumps(meta), payload, *self._times(), c.max_unfinished, c.max_bytes, name, mark)
        outcome = reply[0].decode()
        if outcome == "full":
            raise JobsFull(f"{reply[1]} jobs have not ended, at most {c.max_unfinished} jobs and {c.max_bytes} bytes may wait")
        if outcome == "conflict":
            raise JobConflict("this Idempotency-Key was used with another request")
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
        reply = await self._run("claim", token, int(c.lease_s * 1000), c.max_lost, lost_problem, *self._times())
        if reply is None:
            return None
        job_id, kind, meta, payload, left = reply
        return Claim(job_id.decode(), token, kind.decode(), json.loads(meta), payload, left / 1000)

    async def renew(self, claim: Claim) -> bool:
        """Hold the job for another lease; False when it is no longer ours."""
        return bool(await self._run("renew", claim.id, claim.token, int(self._config.lease_s * 1000)))

    async def finish(self, claim: Claim, state: Literal["succeeded", "failed"], answer: bytes = b"", problem: bytes = b"") -> bool:
        """End the job; False when it is no longer ours, and then nothing changed."""
        return bool(await self._run("finish", claim.id, claim.token, state, answer, problem, *self._times()))

    async def release(self, claim: Claim, delay_s: float) -> bool:
        """Give the job back, to be claimed after ``delay_s``; False when it is no longer ours."""
        return bool(await self._run("release", claim.id, claim.token, int(delay_s * 1000)))

    async def cancel(self, job_id: str) -> bool:
        """Cancel a job that has not ended; False when it had, or is not known."""
        return bool(await self._run("cancel", job_id, *self._times()))

    async def counts(self) -> dict[str, int]:
        """Queued and running jobs, and the bytes they hold."""
        try:
            async with self._redis.pipeline(transaction=False) as batch:
                batch.zcard(f"{self._prefix}queue")
                batch.zcard(f"{self._prefix}running")
                batch.get(f"{self._prefix}bytes")
                queued, running, size = await batch.execute()
        except RedisError as error:
            raise self._lost(error) from None
        return {"queued": queued, "running": running, "bytes": int(size or 0)}

    async def close(self) -> None:
        """Close the connections."""
        await self._redis.aclose()

    def _times(self) -> tuple[int, int]:
        return int(self._config.ttl_s * 1000), int(self._config.tombstone_s * 1000)

    async def _run(self, script: str, *args: Any) -> Any:
        try:
            return await self._scripts[script](keys=[self._prefix], args=args)
        except RedisError as error:
            raise self._lost(error) from None

    def _lost(self, error: RedisError) -> JobStoreError:
        return JobStoreError(f"Redis at {self._where}: {' '.join(str(error).split()) or type(error).__name__}")
