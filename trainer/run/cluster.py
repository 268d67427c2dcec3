"""Starting what is missing and joining what is given: Ray, Redis, the reward fleet. Each part undoes itself.

Every function registers its clean-up on the ExitStack it is handed before it returns, so whatever stops a run (an
error, Ctrl-C, the end) takes down exactly what the run started, in reverse order.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from replay.config import RedisConfig
from replay.connect import connect
from replay.embedded import EmbeddedRedis, refuse_several_nodes
from replay.errors import ReplayError
from trainer.config.run import RayConfig, RunConfig
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder
from trainer.run.local_ray import end_processes, free_ports, own_folder, sweep
from trainer.run.resources import check_resources

if TYPE_CHECKING:
    from actors.rewards import RunRewards

logger = logging.getLogger(__name__)


def start_ray(config: RayConfig, stack: ExitStack) -> None:
    """Join `config.address`, or start a local cluster. Raises RunFailed. See `trainer.run.environment`."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if config.address is None:
            sweep()
            _start_local(config, own_folder(stack), common)
        else:
            ray.init(config.address, **common)
    except Exception as error:
        where = "a local Ray cluster did not start" if config.address is None else f"cannot join Ray at {config.address}"
        raise RunFailed("Ray", f"{where}: {describe(error)}") from error
    stack.callback(ray.shutdown)


def _start_local(config: RayConfig, own: Path, common: dict[str, Any]) -> None:
    """Start a cluster in the folder `own`. Ray gives its node 30 s, which nothing can change (`ray._private.node`): a machine that is
    busy beyond that gets a second try."""
    import ray

    for tries_left in (1, 0):
        try:
            with free_ports():
                # "local" starts a new cluster even where RAY_ADDRESS names another
                ray.init("local", num_cpus=config.cpus, include_dashboard=False, object_store_memory=config.object_store_mb << 20, _temp_dir=str(own), **common)
            return
        except Exception as error:
            if not tries_left or "timed out during startup" not in str(error):
                raise
            logger.warning("Ray's node did not start within 30 s, because this machine is busy (load %.0f); trying once more", os.getloadavg()[0])
            ray.shutdown()
            end_processes(own)


def start_redis(config: RedisConfig, folder: RunFolder, max_bytes: int, stack: ExitStack) -> str:
    """URL of the ledger's Redis; starts the embedded server if that is asked for. Raises RunFailed.

    `max_bytes`: the payloads it will hold, 0 when they lie elsewhere.
    """
    try:
        if config.url == "embedded":
            server = EmbeddedRedis.start(folder.redis, max_bytes=max_bytes, fsync=config.fsync)
            stack.callback(server.stop)
            return server.url
        connect(config.url, config.connect_timeout_s).close()
    except ReplayError as error:
        raise RunFailed("Redis", str(error)) from error
    return config.url


def check_nodes(config: RunConfig, rewards: RunRewards) -> None:
    """Refuse an embedded Redis on several nodes, and a local cluster that can never hold the run. Ray must be up.

    Raises RunFailed, ConfigError. A cluster that was joined may grow, so what it lacks is waited for.
    """
    import ray

    if config.ray.address is None:
        total: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        check_resources(config, rewards.own_needs, total)
    if config.redis.url != "embedded":
        return
    try:
        refuse_several_nodes(len([node for node in ray.nodes() if node["Alive"]]))
    except ReplayError as error:
        raise RunFailed("Redis", str(error)) from error


def start_fleet(rewards: RunRewards, joined: bool, stack: ExitStack) -> None:
    """Deploy the run's own reward fleet and wait until it scores; nothing where a service was given or no reward is named.

    With a local cluster the fleet ends as Ray does; in a cluster that was `joined` it is an application of its own, which this run
    takes down and no other. Raises RunFailed.
    """
    if rewards.fleet.url is not None or not rewards.names:
        return
    from services.fleet import start

    if joined:
        stack.callback(_quietly, lambda: _stop(rewards.app))
    try:
        start.start_fleet(rewards.fleet, rewards.app, http=False)
    except Exception as error:
        raise RunFailed("reward fleet", describe(error)) from error


def _stop(app: str) -> None:
    from services.fleet.start import stop_fleet

    stop_fleet(app)


def _quietly(action: Callable[[], object]) -> None:
    """Run a clean-up whose failure must not hide what happened before."""
    with contextlib.suppress(Exception):
        action()
