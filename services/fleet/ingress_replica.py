"""One ingress process of a deployed fleet: the REST app over the Serve handles."""

from __future__ import annotations

from typing import Any

from ray import serve
from starlette.types import ASGIApp

from services.fleet.assembly import Assembled, assemble
from services.fleet.file import parse_fleet
from services.fleet.serve_backend import ServeBackend
from services.rest.metrics import FleetMetrics


class Ingress:
    """Built by Serve in each replica from plain values; ``scorers`` are bound so that they belong to the application."""

    def __init__(self, config: dict[str, Any], *scorers: Any) -> None:
        del scorers  # found by name
        self._config = parse_fleet(config)
        self._rest: Assembled | None = None

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """What Serve hands the HTTP requests to."""
        metrics = FleetMetrics()
        self._rest = assemble(self._config, ServeBackend(self._config, metrics, serve.get_replica_context().app_name), metrics, behind_serve=True)
        return self._rest.app

    async def drain(self, timeout_s: float) -> bool:
        """Take nothing new and finish what is open; False when some of it still was after ``timeout_s``."""
        if self._rest is None:
            return True
        self._rest.drain.close()
        done = await self._rest.drain.idle(timeout_s)
        await self._rest.jobs.stop()
        return done
