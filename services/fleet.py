"""The fleet as a Ray Serve application named ``rewards``, and how to start and stop it inside a running Ray.

Lifecycle: ``start_fleet`` (Serve up on 127.0.0.1 → deployments up, self-tests passed → ``/healthz`` answers)
→ scores → ``stop_fleet``, which removes this application only. Invariant: ``start_fleet`` either returns the
URL of a fleet that answers, or raises ``FleetError`` naming the part that failed and leaves no application
behind.

A replica that dies mid-request costs a repeat inside the ingress, not an error to the client: scoring has no
effects.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from collections.abc import Callable
from typing import Any

import httpx
import ray
from fastapi import FastAPI
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from services.client.base import ItemScore, Media, ScoreFailure
from services.client.handle import APP_NAME, ScoreChunk, replica_loss_errors
from services.client.retry import Backoff
from services.config import RewardConfig
from services.ingress import make_app
from services.problems import ProblemError
from services.replica import ScorerReplica
from services.schemas import ModelHealth, ModelInfo

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
INGRESS = "ingress"
# One thread per engine, whatever library it uses: replicas are the unit of parallelism.
THREAD_CAPS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT"), "1")


class FleetError(RuntimeError):
    """The fleet could not be started."""


class ServeBackend:
    """``ScoreBackend`` over Serve handles; used by the ingress replica."""

    def __init__(self, models: list[str], timeout_s: float, app: str = APP_NAME) -> None:
        self._handles = {name: serve.get_deployment_handle(name, app_name=app) for name in models}
        self._timeout_s = timeout_s
        self._infos: list[ModelInfo] = []

    async def models(self) -> list[ModelInfo]:
        """See ``ScoreBackend.models``. The answer is kept: revisions change only with a new deployment."""
        if not self._infos:
            self._infos = [await self._call(handle, self._timeout_s, "info") for handle in self._handles.values()]
        return self._infos

    async def score(self, model: str, prompts: list[str], media: list[Media], deadline_s: float) -> list[ItemScore | ScoreFailure]:
        """See ``ScoreBackend.score``."""
        results: list[ItemScore | ScoreFailure] = await self._call(self._handles[model], deadline_s, "score", ScoreChunk(prompts, media))
        return results

    async def health(self) -> list[ModelHealth]:
        """See ``ScoreBackend.health``."""
        return [ModelHealth(name=info.name, status="ready") for info in await self.models()]

    async def _call(self, handle: Any, timeout_s: float, method: str, *args: Any) -> Any:
        """One call, repeated when its replica dies, until ``timeout_s`` have passed."""
        lost = replica_loss_errors()
        backoff = Backoff(timeout_s)
        while True:
            response = getattr(handle, method).remote(*args)
            try:
                async with asyncio.timeout(backoff.remaining()):
                    return await response
            except lost as error:
                logger.warning("scorer replica lost mid-request (%s), trying again", type(error).__name__)
            except TimeoutError:
                response.cancel()
                detail = f"no score within {timeout_s:g} s"
                raise ProblemError(504, "deadline_exceeded", detail) from None
            except BackPressureError as error:
                raise ProblemError(503, "queue_full", "the scorer's queue is full", retry_after_s=1) from error
            except DeploymentUnavailableError as error:
                detail = "the scorer failed to start"
                raise ProblemError(503, "scorer_unavailable", detail, retry_after_s=10) from error
            wait = backoff.next_wait()
            if wait is None:
                detail = "the scorer's replicas keep dying"
                raise ProblemError(503, "scorer_unavailable", detail, retry_after_s=5)
            await asyncio.sleep(wait)


def build_app(config: RewardConfig) -> serve.Application:
    """The Serve application: one deployment per reward model behind one ingress."""
    models = [config.model]
    scorers = [_scorer_deployment(model, config) for model in models]
    ingress = serve.deployment(
        name=INGRESS,
        ray_actor_options={"num_cpus": 0.1},
        max_ongoing_requests=64,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        max_queued_requests=config.max_queued_requests,
        logging_config=LoggingConfig(enable_access_log=False),
    )(serve.ingress(_asgi_builder(models, config))())
    # Binding the scorers makes them part of the application; the ingress finds them by name.
    application: serve.Application = ingress.bind(*scorers)
    return application


def start_fleet(config: RewardConfig) -> str:
    """Deploy the fleet and wait until it scores. Ray must be initialised. Returns the base URL of the REST
    ingress.

    If Serve already runs in this cluster its own HTTP address is used and ``config.port`` has no effect.
    """
    if not ray.is_initialized():
        raise FleetError("Ray is not initialised; call ray.init() before start_fleet()")
    deadline = time.monotonic() + config.start_timeout_s
    port = config.port if config.port not in (0, "auto") else _free_port()
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        # The ingress keeps the deadline; the proxy's is a backstop behind it.
        http_options=HTTPOptions(host=HOST, port=int(port), request_timeout_s=config.timeout_s + 10),
        logging_config=LoggingConfig(enable_access_log=False),
    )
    try:
        serve.run_many(
            [serve.RunTarget(target=build_app(config), name=APP_NAME, route_prefix="/")],
            wait_for_applications_running=False,
        )
        _wait_running(deadline, config)
        url = _address()
        _wait_answering(url, deadline)
    except BaseException:
        stop_fleet()
        raise
    return url


def stop_fleet() -> None:
    """Remove the ``rewards`` application if it is there; other Serve applications and Serve itself stay."""
    if ray.is_initialized() and APP_NAME in serve.status().applications:
        serve.delete(APP_NAME)


def _scorer_deployment(model: str, config: RewardConfig) -> serve.Application:
    deployment = serve.deployment(
        name=model,
        num_replicas=config.replicas,
        ray_actor_options={"num_cpus": config.replica_cpus, "runtime_env": _runtime_env()},
        # A request holds at least one image, so a batch of max_batch_items can always fill.
        max_ongoing_requests=2 * config.max_batch_items,
        max_queued_requests=config.max_queued_requests,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.1,
        # A scorer whose self-test fails will fail again.
        max_constructor_retry_count=2,
        logging_config=LoggingConfig(enable_access_log=False),
    )(ScorerReplica)
    application: serve.Application = deployment.bind(model, config)
    return application


def _runtime_env() -> dict[str, Any]:
    """The job's runtime environment plus thread caps; Serve by itself would keep only its working_dir."""
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return {**job, "env_vars": {**job.get("env_vars", {}), **THREAD_CAPS}}


def _asgi_builder(models: list[str], config: RewardConfig) -> Callable[[], FastAPI]:
    def build() -> FastAPI:
        return make_app(ServeBackend(models, config.timeout_s), config.limits)

    return build


def _wait_running(deadline: float, config: RewardConfig) -> None:
    """Wait for all deployments; raise with the failing one's name and message."""
    while True:
        app = serve.status().applications.get(APP_NAME)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise FleetError(f"the reward fleet failed to start: {_describe(app)}")
        if time.monotonic() > deadline:
            state = _describe(app) if app is not None else "the application was never created"
            need = config.replicas * config.replica_cpus + 0.1
            resources: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            free = resources.get("CPU", 0.0)
            raise FleetError(
                f"the reward fleet was not ready after {config.start_timeout_s:g} s: {state}. It needs "
                f"{need:g} Ray CPUs ({free:g} are free now); lower reward.replicas "
                "or raise reward.start_timeout_s"
            )
        time.sleep(0.1)


def _describe(app: ApplicationStatusOverview) -> str:
    parts = [f"{name} is {d.status.value}: {_last_line(d.message)}" for name, d in app.deployments.items() if d.status != "HEALTHY"]
    return "; ".join(parts) or _last_line(app.message)


def _last_line(message: str) -> str:
    """The exception's own line of the traceback that Serve reports."""
    return (message.strip().splitlines() or ["no message yet"])[-1][-600:]


def _wait_answering(url: str, deadline: float) -> None:
    """Wait until the proxy routes to the ingress."""
    last = "no attempt"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(f"{url}/healthz", timeout=2)
            if answer.status_code == 200:
                return
            last = f"HTTP {answer.status_code}"
        except httpx.TransportError as error:
            last = str(error) or type(error).__name__
        time.sleep(0.1)
    raise FleetError(f"the reward fleet runs but its REST ingress at {url} does not answer: {last}")


def _address() -> str:
    """Where Serve's HTTP proxy really listens: Serve keeps the options of whoever started it first."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    options = client.http_config
    if options.host not in (HOST, "localhost", "::1"):
        logger.warning("Serve was started on %s: the reward ingress has no authentication", options.host)
    return f"http://{HOST}:{options.port}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind((HOST, 0))
        return int(s.getsockname()[1])
