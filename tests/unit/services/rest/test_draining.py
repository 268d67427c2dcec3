"""The gate of a stopping service: open requests end, new ones are refused, health stays."""

from __future__ import annotations

import asyncio

import httpx
import pytest
from fastapi import FastAPI
from starlette.middleware import Middleware

from services.limits import LimitsConfig
from services.rest import problems
from services.rest.draining import Drain, DrainGate
from services.rest.guard import Access, Guard
from services.rest.metrics import FleetMetrics


def app_with(drain: Drain, release: asyncio.Event) -> FastAPI:
    app = FastAPI()
    problems.install(app)
    app.add_middleware(Guard, access=Access(None), limits=LimitsConfig(), metrics=FleetMetrics())
    app.user_middleware.append(Middleware(DrainGate, drain=drain))

    @app.get("/slow")
    async def slow() -> str:
        await release.wait()
        return "done"

    @app.get("/healthz")
    async def healthz() -> str:
        return "ok"

    return app


def test_draining() -> None:
    async def body() -> None:
        drain, release = Drain(), asyncio.Event()
        transport = httpx.ASGITransport(app=app_with(drain, release))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
            opened = asyncio.create_task(client.get("/slow"))
            while drain.open_requests == 0:
                await asyncio.sleep(0)
            drain.close()
            assert not await drain.idle(0.01)
            refused = await client.get("/slow", headers={"X-Request-ID": "mine"})
            assert (refused.status_code, refused.json()["code"], refused.headers["retry-after"]) == (503, "draining", "5")
            assert refused.headers["x-request-id"] == "mine", "the refusal is a document like any other"
            assert (await client.get("/healthz")).status_code == 200
            release.set()
            assert (await opened).json() == "done"
            assert await drain.idle(5)
            assert drain.open_requests == 0

    asyncio.run(body())


def test_a_request_that_raises_is_no_longer_open() -> None:
    async def body() -> None:
        drain = Drain()

        async def broken(scope: object, receive: object, send: object) -> None:
            raise RuntimeError("broken")

        gate = DrainGate(broken, drain)  # type: ignore[arg-type]
        with pytest.raises(RuntimeError):
            await gate({"type": "http", "path": "/"}, None, None)  # type: ignore[arg-type]
        assert await drain.idle(0.1)

    asyncio.run(body())
