"""Stopping without losing anybody: what is open is finished, nothing new is taken.

Lifecycle: open → ``Drain.close()`` → every new request is refused with 503 ``draining`` and ``Retry-After`` → ``idle`` once
the last open one has its answer. ``/healthz`` and ``/metrics`` always pass: a draining process is alive.
"""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Receive, Scope, Send

from services.errors import ProblemError
from services.rest.guard import route_path

ALWAYS = ("/healthz", "/metrics")


class Drain:
    """Counts the open requests of one process."""

    def __init__(self) -> None:
        self.closed = False
        self._open = 0
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def open_requests(self) -> int:
        """Requests that have no full answer yet."""
        return self._open

    def enter(self) -> None:
        """One more."""
        self._open += 1
        self._idle.clear()

    def leave(self) -> None:
        """One less."""
        self._open -= 1
        if self._open == 0:
            self._idle.set()

    def close(self) -> None:
        """Take no new requests."""
        self.closed = True

    async def idle(self, timeout_s: float) -> bool:
        """Wait until no request is open; False when some still are after ``timeout_s``."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True


class DrainGate:
    """ASGI middleware, inside the guard (which makes the refusal a document)."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http" or route_path(scope) in ALWAYS:
            await self._app(scope, receive, send)
            return
        if self._drain.closed:
            raise ProblemError(503, "draining", "the service is stopping", retry_after_s=5)
        self._drain.enter()
        try:
            await self._app(scope, receive, send)
        finally:
            self._drain.leave()
