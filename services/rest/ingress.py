"""The REST face of the fleet: a thin FastAPI app that parses off the event loop and asks the scorers.

Lifecycle of ``POST /v1/score``: guard (id, headers, key, size) → body → parsed in a thread → ``Scoring`` within the
request's deadline → per item scores or a typed error. A client that leaves takes its work with it. The app knows its
scorers only through ``ScoreBackend``. Other routes (jobs, the page) are routers that find ``scoring``, ``limits``,
``idempotency`` and ``metrics`` in ``request.app.state.services``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from anyio import to_thread
from fastapi import APIRouter, FastAPI, Header, Query, Request, Response
from starlette.requests import ClientDisconnect

from services.backend import ScoreBackend
from services.contract import ModelInfo
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.rest import docs, problems
from services.rest.auth import Key, Keyring
from services.rest.guard import Access, Guard
from services.rest.idempotency import Answer, IdempotencyStore, Kept, MemoryIdempotency, once
from services.rest.metrics import CONTENT_TYPE, FleetMetrics
from services.rest.openapi import SCORE_BODY, install_openapi
from services.rest.problems import documented, request_id_of
from services.rest.requests import ScoreCall, parse_call
from services.rest.schemas import Health, ModelList, MultiScoreResponse, Name, Readiness, ScoreResponse, TimeoutS
from services.rest.scoring import LatentDecoder, Scoring

T = TypeVar("T")

IDEMPOTENCY_KEY = r"^[\x21-\x7e]{1,128}$"
RequestId = Annotated[
    str | None, Header(alias="X-Request-ID", description="Your id for this request, [A-Za-z0-9._-]{1,128}; echoed. Another form is replaced by a new id.")
]
TimeoutHeader = Annotated[TimeoutS | None, Header(alias="X-Timeout-S", description="Deadline in seconds; the field timeout_s does the same and wins.")]
KeyHeader = Annotated[
    str | None, Header(alias="Idempotency-Key", pattern=IDEMPOTENCY_KEY, description="Sent again with the same request, gives the same answer again.")
]

router = APIRouter()


@dataclass(frozen=True)
class Services:
    """What the routes work with."""

    backend: ScoreBackend
    scoring: Scoring
    limits: LimitsConfig
    metrics: FleetMetrics
    idempotency: IdempotencyStore


def services_of(request: Request) -> Services:
    """The services of the app that serves ``request``."""
    found: Services = request.app.state.services
    return found


def owner_of(request: Request) -> str:
    """Name of the caller's key; 'local' where no keys are in use."""
    key: Key | None = getattr(request.state, "key", None)
    return "local" if key is None else key.name


def make_app(
    backend: ScoreBackend,
    limits: LimitsConfig,
    *,
    keyring: Keyring | None = None,
    metrics: FleetMetrics | None = None,
    idempotency: IdempotencyStore | None = None,
    decoder: LatentDecoder | None = None,
    routers: Sequence[APIRouter] = (),
    open_paths: Collection[str] = (),
    hosts: Collection[str] = (),
    behind_serve: bool = False,
) -> FastAPI:
    """The REST app over ``backend``.

    ``keyring``: keys that may call; None serves this machine only (see ``guard.Access``). ``routers`` are added as they
    are; they need a key like every path outside ``open_paths``. ``hosts``: further names of this service for callers
    without keys. ``behind_serve``: see ``guard.Guard``.
    """
    metrics = metrics or FleetMetrics()
    about = "Scores generated images and clips. A failure is a typed error per item, never a number."
    app = FastAPI(title="ddrl reward fleet", version="1", description=about, docs_url=None, redoc_url=None)
    store = idempotency or MemoryIdempotency(limits.idempotency_ttl_s, limits.idempotency_bytes)
    app.state.services = Services(backend, Scoring(backend, limits, metrics, decoder), limits, metrics, store)
    problems.install(app)
    app.add_middleware(Guard, access=Access(keyring, open_paths, hosts), limits=limits, metrics=metrics, behind_serve=behind_serve)
    app.include_router(router)
    app.include_router(docs.router)
    for extra in routers:
        app.include_router(extra)
    install_openapi(app, keyed=keyring is not None)
    return app


@router.get("/healthz", responses=documented(403))
async def healthz() -> Health:
    """Whether the ingress is alive."""
    return Health()


@router.get("/readyz", responses=documented(403, 404, 422, 503))
async def readyz(request: Request, model: Annotated[list[Name] | None, Query(description="Models to ask about; all by default.")] = None) -> Readiness:
    """Whether all models, or the named ones, can score."""
    states = {health.name: health.status for health in await services_of(request).backend.health()}
    for name in model or ():
        if name not in states:
            raise ProblemError(404, "model_not_found", f"no model {name!r}")
    asked = model or list(states)
    waiting = [name for name in asked if states[name] != "ready"]
    if waiting:
        raise ProblemError(503, "not_ready", f"not ready: {', '.join(waiting)}", retry_after_s=2)
    return Readiness(models=asked)


@router.get("/v1/models", responses=documented(401, 403, 503, 504))
async def models(request: Request) -> ModelList:
    """The reward models of this fleet."""
    return ModelList(models=await services_of(request).backend.models())


@router.get("/v1/models/{name}", responses=documented(401, 403, 404, 422, 503, 504))
async def model(request: Request, name: Name) -> ModelInfo:
    """One reward model: media, sub-scores, and the frames it looks at."""
    for info in await services_of(request).backend.models():
        if info.name == name:
            return info
    raise await services_of(request).scoring.missing(name)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **documented(401, 403, 503)})
async def metrics_text(request: Request) -> Response:
    """Figures for Prometheus; needs the scope admin where keys are in use."""
    services = services_of(request)
    services.metrics.health(await services.backend.health())
    return Response(services.metrics.text(), media_type=CONTENT_TYPE)


@router.post(
    "/v1/score",
    response_model=ScoreResponse | MultiScoreResponse,
    response_model_exclude_none=True,
    openapi_extra=SCORE_BODY,
    responses=documented(400, 401, 403, 404, 408, 409, 413, 415, 422, 431, 500, 503, 504),
)
async def score(request: Request, _: RequestId = None, x_timeout_s: TimeoutHeader = None, idempotency_key: KeyHeader = None) -> Response:
    """Score images and clips against their prompts, with one reward or several."""
    services = services_of(request)
    call = await read_call(request, services.limits)
    timeout_s = deadline_of(call, x_timeout_s, services.limits)

    async def work() -> Answer:
        answer = await services.scoring.answer(call, timeout_s, request_id_of(request))
        body = await to_thread.run_sync(lambda: answer.model_dump_json(exclude_none=True).encode())
        return Answer(Kept(body, "application/json"), not has_retryable(answer))

    done = await while_connected(request, once(services.idempotency, owner_of(request), idempotency_key, call.fingerprint, work))
    if done is None:
        return Response(status_code=499)  # nobody listens
    kept, replayed = done
    return Response(kept.body, media_type=kept.media_type, headers={"Idempotency-Replayed": "true"} if replayed else None)


async def read_body(request: Request, limits: LimitsConfig) -> bytes:
    """The whole body. Raises ``ProblemError`` 408 when it comes too slowly, 499 when the client leaves."""
    try:
        async with asyncio.timeout(limits.body_timeout_s):
            return await request.body()
    except TimeoutError:
        raise ProblemError(408, "body_timeout", f"the body did not arrive within {limits.body_timeout_s:g} s") from None
    except ClientDisconnect:
        raise ProblemError(499, "client_closed", "the client left") from None


async def read_call(request: Request, limits: LimitsConfig) -> ScoreCall:
    """The request's body, parsed in a thread. Raises ``ProblemError``."""
    body = await read_body(request, limits)
    return await to_thread.run_sync(parse_call, request.headers.get("content-type", ""), body, limits)


def deadline_of(call: ScoreCall, header: float | None, limits: LimitsConfig) -> float:
    """Seconds this call may take."""
    return min(call.options.timeout_s or header or limits.default_timeout_s, limits.max_timeout_s)


def has_retryable(answer: ScoreResponse | MultiScoreResponse) -> bool:
    """Whether an item failed in a way that asking again may mend."""
    scores = answer.results if isinstance(answer, ScoreResponse) else [r for reward in answer.rewards.values() for r in reward.results]
    return any(score.error is not None and score.error.retryable for score in scores)


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of ``work``; None, with the work cancelled, when the client leaves first. The body must have been read."""
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
