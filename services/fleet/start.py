"""The fleet as a Ray Serve application named ``rewards``, and how to start and stop it inside a running Ray.

Lifecycle: ``start_fleet`` (Serve up → deployments up, self-tests passed → ``/healthz`` answers) → scores → ``drain_fleet``
(nothing new is taken, what was accepted gets its answer) → ``stop_fleet``, which removes this application only. Invariant:
``start_fleet`` either returns the URL of a fleet that answers, or raises ``FleetError`` naming the part that failed and leaves
no application behind.
"""

from __future__ import annotations

import logging
import socket
import time
from typing import Any

import httpx
import ray
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import ApplicationStatusOverview, LoggingConfig

from services.client.handle import APP_NAME
from services.fleet.file import FleetConfig
from services.fleet.ingress_replica import Ingress
from services.fleet.replica import ScorerReplica
from services.rest.auth import KeysError, load_keys, require_keys
from services.scorers.settings import RewardSettings

logger = logging.getLogger(__name__)

INGRESS = "ingress"
QUIET = LoggingConfig(enable_access_log=False)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


class FleetError(RuntimeError):
    """The fleet could not be started."""


def build_app(config: FleetConfig) -> serve.Application:
    """The Serve application: one deployment per reward behind one ingress."""
    scorers = [_scorer_deployment(name, reward, config) for name, reward in config.rewards.items()]
    ingress = serve.deployment(
        name=INGRESS,
        num_replicas=config.ingress.replicas,
        ray_actor_options={"num_cpus": config.ingress.cpus, "runtime_env": _runtime_env(1)},
        max_ongoing_requests=config.ingress.max_ongoing,
        max_queued_requests=config.ingress.max_queued,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=config.drain_s,
        graceful_shutdown_wait_loop_s=0.1,
        logging_config=QUIET,
    )(serve.ingress()(Ingress))
    # Binding the scorers makes them part of the application; the ingress finds them by name.
    application: serve.Application = ingress.bind(config.model_dump(mode="json"), *scorers)
    return application


def start_fleet(config: FleetConfig) -> str:
    """Deploy the fleet and wait until it scores. Ray must be initialised. Returns the base URL of the REST ingress.

    If Serve already runs in this cluster its own HTTP address is used; ``config.host`` and ``config.port`` have no effect.
    """
    if not ray.is_initialized():
        raise FleetError("Ray is not initialised; call ray.init() before start_fleet()")
    deadline = time.monotonic() + config.start_timeout_s
    serve.start(
        proxy_location=ProxyLocation.HeadOnly,
        # The ingress keeps the deadlines; the proxy's is a backstop behind them.
        http_options=HTTPOptions(host=config.host, port=config.port or _free_port(), request_timeout_s=config.limits.max_timeout_s + 10),
        logging_config=QUIET,
    )
    try:
        serve.run_many(
            [serve.RunTarget(target=build_app(config), name=APP_NAME, route_prefix="/")],
            wait_for_applications_running=False,
        )
        _wait_running(deadline, config)
        url = _address(config)
        _wait_answering(url, deadline)
    except BaseException:
        stop_fleet()
        raise
    return url


def drain_fleet(timeout_s: float) -> bool:
    """Let the ingress finish what it has accepted and take nothing new; False when some of it was still open at the end."""
    handle = serve.get_deployment_handle(INGRESS, app_name=APP_NAME)
    finished: list[bool] = handle.broadcast("drain", timeout_s).results(timeout_s=timeout_s + 10)
    return all(finished)


def stop_fleet() -> None:
    """Remove the ``rewards`` application if it is there; other Serve applications and Serve itself stay."""
    if ray.is_initialized() and APP_NAME in serve.status().applications:
        serve.delete(APP_NAME)


def _scorer_deployment(name: str, reward: RewardSettings, config: FleetConfig) -> serve.Application:
    low, high = reward.replicas.min, reward.replicas.max
    scale: dict[str, Any] = {"num_replicas": low}
    if high > low:
        bounds = {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": reward.target_ongoing}
        scale = {"autoscaling_config": {**bounds, "upscale_delay_s": 5, "downscale_delay_s": 120, "look_back_period_s": 20}}
    deployment = serve.deployment(
        name=name,
        ray_actor_options={"num_cpus": reward.cpus, "num_gpus": reward.gpus, "runtime_env": _runtime_env(max(1, int(reward.cpus)))},
        # One batch at work and the next one waiting beside it; everything else waits where any free replica can take it.
        max_ongoing_requests=2 * reward.batch_items,
        max_queued_requests=reward.max_queued,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,  # what is cut off is repeated on another replica
        graceful_shutdown_wait_loop_s=0.1,
        # A scorer whose self-test fails will fail again.
        max_constructor_retry_count=2,
        logging_config=QUIET,
        **scale,
    )(ScorerReplica)
    application: serve.Application = deployment.bind(name, reward.model_dump(mode="json"))
    return application


def _runtime_env(threads: int) -> dict[str, Any]:
    """The job's runtime environment plus thread caps, as replicas are the unit of parallelism; Serve by itself would keep
    only its working_dir."""
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return {**job, "env_vars": {**job.get("env_vars", {}), **dict.fromkeys(THREAD_VARIABLES, str(threads))}}


def _wait_running(deadline: float, config: FleetConfig) -> None:
    """Wait for all deployments; raise with the failing one's name and message."""
    while True:
        app = serve.status().applications.get(APP_NAME)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise FleetError(f"the reward fleet failed to start: {_describe(app)}")
        if time.monotonic() > deadline:
            state = _describe(app) if app is not None else "the application was never created"
            need = {kind: amount for kind, amount in config.needs().items() if amount}
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            wants = " and ".join(f"{amount:g} Ray {kind}s ({free.get(kind, 0):g} are free now)" for kind, amount in need.items())
            raise FleetError(
                f"the reward fleet was not ready after {config.start_timeout_s:g} s: {state}. It needs {wants}; ask for fewer replicas or raise start_timeout_s"
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


def _address(config: FleetConfig) -> str:
    """Where Serve's HTTP proxy really listens: Serve keeps the options of whoever started it first."""
    from ray.serve.context import _get_global_client

    client: Any = _get_global_client()
    options = client.http_config
    try:
        require_keys(options.host, load_keys(config.keys_file))
    except KeysError as error:
        raise FleetError(f"Serve listens on {options.host}: {error}") from error
    host = "127.0.0.1" if options.host in ("0.0.0.0", "localhost") else options.host
    return f"http://[{host}]:{options.port}" if ":" in host else f"http://{host}:{options.port}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
