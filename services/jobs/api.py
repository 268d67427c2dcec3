"""``/v1/jobs``: scoring that outlives the connection, and the process, that asked for it.

Lifecycle: POST the body of ``/v1/score`` → 202 and ``Location`` → GET that until ``succeeded`` or ``failed`` → the answer is
kept for ``jobs.ttl_s`` and then 410. A request that could never be answered is refused at once, as ``/v1/score`` refuses it.
A job belongs to the key that made it; for any other key it does not exist.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Path, Request, Response
from pydantic import TypeAdapter

from services.errors import ProblemError
from services.jobs.config import JobsConfig
from services.jobs.store import Claim, Job, JobConflict, JobsFull, JobStore, JobStoreError
from services.jobs.tasks import ended
from services.jobs.worker import Handler, JobWorker, Outcome
from services.rest.idempotency import mismatch
from services.rest.ingress import KeyHeader, RequestId, Services, TimeoutHeader, has_retryable, owner_of, read_call, services_of
from services.rest.openapi import SCORE_BODY
from services.rest.problems import documented
from services.rest.requests import parse_call
from services.rest.schemas import JobStatus, MultiScoreResponse, Problem, ScoreResponse

logger = logging.getLogger(__name__)

SCORE = "score"
MEASURE_S = 5.0  # between two looks at the queue for the figures
JobId = Annotated[str, Path(pattern=r"^[0-9a-f]{32}$", description="A job's id, as POST gave it.")]
_ANSWER: TypeAdapter[ScoreResponse | MultiScoreResponse] = TypeAdapter(ScoreResponse | MultiScoreResponse)


def unavailable(detail: str = "this fleet keeps no jobs; start it with redis_url (for one machine: 'embedded')") -> ProblemError:
    """503 for everything that needs jobs."""
    return ProblemError(503, "jobs_unavailable", detail)


class Jobs:
    """The jobs of one ingress process: the store, if there is one, and the worker on it. ``handlers`` makes those of further kinds."""

    def __init__(self, store: JobStore | None) -> None:
        self._store = store
        self._worker: JobWorker | None = None
        self.handlers: dict[str, Callable[[Services], Handler]] = {}

    @property
    def store(self) -> JobStore:
        """The store. Raises ``ProblemError`` 503 without one."""
        if self._store is None:
            raise unavailable()
        return self._store

    def require(self) -> None:
        """Refuse before a body is read where there are no jobs. Raises ``ProblemError`` 503."""
        if self._store is None:
            raise unavailable()

    async def submit(self, kind: str, meta: Mapping[str, str], payload: bytes, once: tuple[str, str] | None = None) -> tuple[str, bool]:
        """See ``JobStore.submit``; its errors as problems."""
        try:
            job_id, new = await self.store.submit(kind, dict(meta), payload, once)
        except JobsFull as error:
            raise ProblemError(503, "queue_full", str(error), retry_after_s=5) from None
        except JobConflict:
            raise mismatch() from None
        except JobStoreError as error:
            raise self._lost(error) from error
        if self._worker is not None:
            self._worker.wake()
        return job_id, new

    async def read(self, job_id: str, owner: str) -> Job:
        """A job of ``owner``. Raises ``ProblemError`` 404 or 410."""
        try:
            job = await self.store.get(job_id)
        except JobStoreError as error:
            raise self._lost(error) from error
        if job is None or job.meta.get("owner") != owner:
            raise ProblemError(404, "job_not_found", "there is no such job; it was never accepted, or it is long forgotten")
        if job.state == "expired":
            raise ProblemError(410, "job_expired", "the job did not end in time, or its answer is no longer kept")
        return job

    async def cancel(self, job_id: str) -> None:
        """Cancel a job if it has not ended."""
        try:
            await self.store.cancel(job_id)
        except JobStoreError as error:
            raise self._lost(error) from error

    async def counts(self) -> dict[str, int] | None:
        """See ``JobStore.counts``; None when there are no jobs or Redis does not answer."""
        if self._store is None:
            return None
        try:
            return await self._store.counts()
        except JobStoreError as error:
            logger.warning("jobs: %s", error)
            return None

    async def stop(self) -> None:
        """Work on no more jobs here; those in hand go back to the queue."""
        if self._worker is not None:
            await self._worker.stop()

    @asynccontextmanager
    async def running(self, services: Services) -> AsyncIterator[None]:
        """The worker runs inside the block."""
        if self._store is None:
            yield
            return
        measuring = asyncio.get_running_loop().create_task(self._measure(services))
        self._worker = JobWorker(self._store, {SCORE: _Score(services), **{kind: make(services) for kind, make in self.handlers.items()}})
        self._worker.start()
        try:
            yield
        finally:
            await ended(measuring)
            await self._worker.stop()
            await self._store.close()

    async def _measure(self, services: Services) -> None:
        while True:
            counts = await self.counts()
            if counts is not None:
                services.metrics.jobs(counts)
            await asyncio.sleep(MEASURE_S)

    def _lost(self, error: JobStoreError) -> ProblemError:
        logger.warning("jobs: %s", error)
        return ProblemError(503, "jobs_unavailable", "the jobs' Redis does not answer", retry_after_s=5)


class _Score:
    """The handler of scoring jobs."""

    def __init__(self, services: Services) -> None:
        self._services = services

    async def __call__(self, claim: Claim) -> Outcome:
        limits = self._services.limits
        call = await to_thread.run_sync(parse_call, claim.meta["content_type"], claim.payload, limits)
        asked = call.options.timeout_s or (float(claim.meta["timeout_s"]) if "timeout_s" in claim.meta else limits.max_timeout_s)
        answer = await self._services.scoring.answer(call, min(asked, limits.max_timeout_s, claim.left_s), claim.meta["request_id"])
        return Outcome(answer.model_dump_json(exclude_none=True).encode(), not has_retryable(answer))


def make_store(url: str | None, config: JobsConfig) -> JobStore | None:
    """The store behind ``redis_url``; None without one. Nothing is connected yet."""
    return None if url is None else JobStore(url, config)


def jobs_router(jobs: Jobs) -> APIRouter:
    """The routes over ``jobs``; the app's lifespan runs the worker."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with jobs.running(app.state.services):
            yield

    router = APIRouter(lifespan=lifespan)

    @router.post(
        "/v1/jobs",
        status_code=202,
        response_model=JobStatus,
        response_model_exclude_none=True,
        openapi_extra=SCORE_BODY,
        responses={
            202: {"headers": {"Location": {"description": "Where to ask for the job.", "schema": {"type": "string"}}}},
            **documented(400, 401, 403, 404, 408, 413, 415, 422, 431, 500, 503),
        },
    )
    async def post(
        request: Request, response: Response, request_id: RequestId = None, x_timeout_s: TimeoutHeader = None, idempotency_key: KeyHeader = None
    ) -> JobStatus:
        """Score later: takes the body of /v1/score, answers at once where to ask for the result."""
        services, owner = services_of(request), owner_of(request)
        jobs.require()
        call = await read_call(request, services.limits)
        await services.scoring.check(call)
        meta = {"content_type": request.headers.get("content-type", ""), "owner": owner, "request_id": request.state.request_id}
        if x_timeout_s is not None:
            meta["timeout_s"] = str(x_timeout_s)
        once = None if idempotency_key is None else (f"{owner} {idempotency_key}", call.fingerprint)
        job_id, new = await jobs.submit(SCORE, meta, await request.body(), once)
        response.headers["Location"] = f"/v1/jobs/{job_id}"
        if not new:
            response.headers["Idempotency-Replayed"] = "true"
        return _wire(await jobs.read(job_id, owner))

    @router.get("/v1/jobs/{job_id}", response_model=JobStatus, response_model_exclude_none=True, responses=documented(401, 403, 404, 410, 422, 503))
    async def get(request: Request, job_id: JobId) -> JobStatus:
        """Where a job is; its result once it succeeded."""
        return _wire(await jobs.read(job_id, owner_of(request)))

    @router.delete("/v1/jobs/{job_id}", response_model=JobStatus, response_model_exclude_none=True, responses=documented(401, 403, 404, 410, 422, 503))
    async def delete(request: Request, job_id: JobId) -> JobStatus:
        """Cancel a job that has not ended; one that has stays as it is."""
        owner = owner_of(request)
        await jobs.read(job_id, owner)
        await jobs.cancel(job_id)
        return _wire(await jobs.read(job_id, owner))

    return router


def _wire(job: Job) -> JobStatus:
    fields: dict[str, Any] = {"id": job.id, "status": job.state, "created_at": job.created_at, "finished_at": job.finished_at, "expires_at": job.expires_at}
    if job.answer is not None:
        fields["result"] = _ANSWER.validate_json(job.answer)
    if job.problem is not None:
        fields["error"] = Problem.model_validate_json(job.problem)
    return JobStatus.model_validate(fields)
