"""Starting and stopping a fleet inside a running Ray, as a Serve application of a name of its own.

Lifecycle: ``start_fleet`` (Serve up → deployments up, self-tests passed → with HTTP, ``/healthz`` answers) → scores → ``drain_fleet``
(nothing new is taken, what was accepted gets its answer) → ``stop_fleet``, which removes this application, and Serve itself only when
no application is left. Invariants: ``start_fleet`` either returns where a fleet answers, or raises ``FleetError`` naming the part that
failed and leaves no application behind; fleets of other names in the same cluster do not notice.

The application ``rewards`` answers at ``/``, one of another name at ``/NAME``. A run's own fleet needs no HTTP and starts faster
without (no proxy, no ingress process).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ApplicationStatusOverview

from services.client.handle import APP_NAME
from services.config import FleetConfig
from services.fleet.application import INGRESS, QUIET, build_app

logger = logging.getLogger(__name__)

ATTEMPTS = 3  # of starting, where another program of the cluster takes Serve down in the middle


class FleetError(RuntimeError):
    """The fleet could not be started."""


def start_fleet(config: FleetConfig, app: str = APP_NAME, *, http: bool = True) -> str:
    """Deploy the fleet as the application ``app`` and wait until it scores. Ray must be initialised.

    Returns the base URL of the REST ingress, or ``serve://app`` without ``http``. If Serve already runs in this cluster its own HTTP
    address is used; ``config.host`` and ``config.port`` have no effect.
    """
    if not ray.is_initialized():
        raise FleetError("Ray is not initialised; call ray.init() before start_fleet()")
    if not config.rewards or config.url is not None:
        raise FleetError(f"there is no fleet to start: {len(config.rewards)} rewards, url {config.url}")
    deadline = time.monotonic() + config.start_timeout_s
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return _deploy(config, app, http, deadline)
        except BaseException as error:
            # Whoever stopped the last application may have taken Serve down with it, between our joining it and our deploying.
            gone = isinstance(error, RayActorError) or (isinstance(error, RayServeException) and "no Serve instance" in str(error))
            if not gone:
                stop_fleet(app)
                raise
            if attempt == ATTEMPTS:
                raise FleetError(f"Serve went away {ATTEMPTS} times while the reward fleet started: {_last_line(str(error))}") from error
            logger.warning("Serve went away while the reward fleet started (%s), starting again", type(error).__name__)
    raise AssertionError("unreachable")


def _deploy(config: FleetConfig, app: str, http: bool, deadline: float) -> str:
    serve.start(
        proxy_location=ProxyLocation.HeadOnly if http else ProxyLocation.Disabled,
        # The ingress keeps the deadlines; the proxy's is a backstop behind them.
        http_options=HTTPOptions(host=config.host, port=config.port or _free_port(), request_timeout_s=config.limits.max_timeout_s + 10),
        logging_config=QUIET,
    )
    prefix = "/" if app == APP_NAME else f"/{app}"
    serve.run_many(
        [serve.RunTarget(target=build_app(config, http), name=app, route_prefix=prefix if http else None)],
        wait_for_applications_running=False,
    )
    _wait_running(deadline, config, app, http)
    if not http:
        return f"serve://{app}"
    url = _address(config) + prefix.rstrip("/")
    _wait_answering(url, deadline)
    return url


def drain_fleet(timeout_s: float, app: str = APP_NAME) -> bool:
    """Let the ingress finish what it has accepted and take nothing new; False when some of it was still open at the end."""
    handle = serve.get_deployment_handle(INGRESS, app_name=app)
    finished: list[bool] = handle.broadcast("drain", timeout_s).results(timeout_s=timeout_s + 5)
    return all(finished)


def stop_fleet(app: str = APP_NAME) -> None:
    """Remove the application ``app`` if it is there, and Serve with it when it was the last one."""
    if not ray.is_initialized():
        return
    running = set(serve.status().applications)
    if running <= {app}:
        serve.shutdown()
    elif app in running:
        serve.delete(app)


def _wait_running(deadline: float, config: FleetConfig, name: str, http: bool) -> None:
    """Wait for all deployments; raise with the failing one's name and message."""
    while True:
        app = serve.status().applications.get(name)
        if app is not None and app.status == "RUNNING":
            return
        if app is not None and app.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise FleetError(f"the reward fleet failed to start: {_describe(app)}")
        if time.monotonic() > deadline:
            state = _describe(app) if app is not None else "the application was never created"
            free: dict[str, float] = ray.available_resources()  # type: ignore[no-untyped-call]
            total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
            why = why_late(config.needs(http), free, total, os.getloadavg()[0], os.cpu_count() or 1)
            raise FleetError(f"the reward fleet was not ready after {config.start_timeout_s:g} s: {state}. {why}")
        time.sleep(0.1)


def why_late(needs: Mapping[Any, float], free: Mapping[str, float], total: Mapping[str, float], load: float, cores: int) -> str:
    """What kept a fleet from starting in time, and what to change: too few resources, resources held by others, or a busy machine."""
    key = "fleet.start_timeout_s (start_timeout_s in a rewards.yaml)"
    busy = f"the load average of this machine is {load:.1f} on {cores} cores"
    for kind, need in needs.items():
        if need > total.get(kind, 0):
            return f"It needs {need:g} Ray {kind}s and the cluster has {total.get(kind, 0):g}: ask for fewer replicas, or add nodes; waiting does not help"
    for kind, need in needs.items():
        if need > free.get(kind, 0):
            return (
                f"It needs {need:g} Ray {kind}s, of which {free.get(kind, 0):g} of {total.get(kind, 0):g} are free now "
                f"(its own started replicas hold theirs), and {busy}: stop other work in this cluster, or raise {key}"
            )
    wants = " and ".join(f"{need:g} Ray {kind}s" for kind, need in needs.items() if need)
    return f"The {wants} that it needs are free, so its processes are only slow to start: {busy}; raise {key}"


def _describe(app: ApplicationStatusOverview) -> str:
    parts = [f"{name} is {d.status.value}: {_last_line(d.message)}" for name, d in app.deployments.items() if d.status != "HEALTHY"]
    return "; ".join(parts) or _last_line(app.message)


def _last_line(message: str) -> str:
    """The exception's own line of the traceback that Serve reports."""
    return (message.strip().splitlines() or ["no message yet"])[-1][-600:]


def _wait_answering(url: str, deadline: float) -> None:
    """Wait until the proxy routes to the ingress."""
    import httpx

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

    from services.rest.auth import KeysError, load_keys, require_keys

    client: Any = _get_global_client()
    options = client.http_config
    if ray.get(client._controller.get_proxy_location.remote()) == ProxyLocation.Disabled:
        raise FleetError("Serve already runs in this cluster without HTTP (a run's own fleet started it): serve the rewards from another cluster")
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
