"""Works on the jobs of a store, a few at a time, inside an ingress process.

Lifecycle of one job: claim → its handler runs while the lease is renewed → answered, or given back when the reward is busy or
late, or failed with the problem a synchronous request would have got. A worker that is stopped gives its jobs back; one that
is killed loses them when their leases end. Invariants: a job that is cancelled meanwhile stops costing within a third of a
lease; an exception of a handler ends its job as ``internal_error`` and nothing else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from services.errors import ProblemError
from services.jobs.store import Claim, JobStore, JobStoreError
from services.jobs.tasks import ended
from services.rest.problems import as_problem

logger = logging.getLogger(__name__)

BUSY = (429, 503)
RETRY_S = 5.0  # before a reward that was late, or failed on some items, is asked again


@dataclass(frozen=True)
class Outcome:
    """A handler's answer; ``complete`` is false when asking again may make it better."""

    answer: bytes
    complete: bool = True


Handler = Callable[[Claim], Awaitable[Outcome]]


class JobWorker:
    """``handlers`` by kind of job. ``start`` and ``stop`` in one event loop; ``wake`` when a job was submitted here."""

    def __init__(self, store: JobStore, handlers: Mapping[str, Handler]) -> None:
        self._store, self._handlers = store, dict(handlers)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._lost = as_problem(ProblemError(500, "worker_lost", "the processes that worked on this job died")).model_dump_json().encode()

    def start(self) -> None:
        """Begin to take jobs."""
        self._tasks = [asyncio.get_running_loop().create_task(self._run()) for _ in range(self._store.config.concurrency)]

    def wake(self) -> None:
        """Look for jobs now."""
        self._wake.set()

    async def stop(self) -> None:
        """Take no more; jobs in hand go back to the queue."""
        await ended(*self._tasks)
        self._tasks = []

    async def _run(self) -> None:
        while True:
            try:
                claim = await self._store.claim(self._lost)
                if claim is None:
                    await self._nap()
                else:
                    await self._work(claim)
            except JobStoreError as error:  # leases end by themselves
                logger.warning("jobs: %s", error)
                await asyncio.sleep(1.0)
            except Exception:  # a worker must not end quietly: nobody would take its jobs
                logger.exception("a job could not be worked on")
                await asyncio.sleep(1.0)

    async def _nap(self) -> None:
        self._wake.clear()
        try:
            async with asyncio.timeout(self._store.config.poll_s):
                await self._wake.wait()
        except TimeoutError:
            return

    async def _work(self, claim: Claim) -> None:
        task = asyncio.ensure_future(self._handled(claim))
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=self._store.config.lease_s / 3)
                if not task.done() and not await self._store.renew(claim):
                    logger.info("job %s is no longer ours", claim.id)
                    return
            await task
        except asyncio.CancelledError:
            await self._store.release(claim, 0, counted=False)
            raise
        finally:
            await ended(task)

    async def _handled(self, claim: Claim) -> None:
        last = claim.tries + 1 >= self._store.config.max_tries
        try:
            outcome = await self._handlers[claim.kind](claim)
        except ProblemError as error:
            if error.status in BUSY:
                await self._store.release(claim, error.retry_after_s or 1.0, counted=False)
            elif error.status == 504 and not last:
                await self._store.release(claim, RETRY_S, counted=True)
            else:
                await self._fail(claim, error)
        except Exception:
            logger.exception("job %s of kind %s failed", claim.id, claim.kind)
            await self._fail(claim, ProblemError(500, "internal_error", "the service failed on this job"))
        else:
            if outcome.complete or last:
                await self._store.finish(claim, "succeeded", outcome.answer)
            else:
                await self._store.release(claim, RETRY_S, counted=True)

    async def _fail(self, claim: Claim, error: ProblemError) -> None:
        await self._store.finish(claim, "failed", problem=as_problem(error).model_dump_json().encode())
