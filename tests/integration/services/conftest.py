"""A real Redis, and the whole REST app over scorers in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn

from replay.embedded import EmbeddedRedis
from services.config import FleetConfig
from services.fleet.assembly import assemble
from services.fleet.file import parse_fleet
from services.fleet.local_backend import LocalBackend
from services.rest.metrics import FleetMetrics
from tests.integration.services.probe_scorers import KIND


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with EmbeddedRedis.start(Path(tmp_path_factory.mktemp("redis"))) as running:
        yield running.url


def fleet(redis: str | None = None, delay_s: float = 0.0, **settings: Any) -> FleetConfig:
    """A fleet of the reward ``mean``."""
    jobs = {"lease_s": 1.0, "poll_s": 0.05, **settings.pop("jobs", {})}
    return parse_fleet({"rewards": {"mean": {"kind": KIND, "delay_s": delay_s}}, "redis_url": redis, "jobs": jobs, **settings})


@contextmanager
def served(config: FleetConfig) -> Iterator[httpx.Client]:
    """The app of ``config`` on a free loopback port, and a client of it."""
    metrics = FleetMetrics()
    rest = assemble(config, LocalBackend(config.rewards), metrics)
    server = uvicorn.Server(uvicorn.Config(rest.app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < deadline, "the test server did not start"
        time.sleep(0.01)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}", timeout=30) as client:
            yield client
    finally:
        server.should_exit = True
        thread.join(20)


@pytest.fixture
def rest() -> Iterator[Callable[[FleetConfig], httpx.Client]]:
    """Serve a fleet until the test ends."""
    with ExitStack() as stack:
        yield lambda config: stack.enter_context(served(config))


def until(condition: Callable[[], Any], seconds: float = 30.0) -> Any:
    """What ``condition`` gives once it is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.02)
    return found
