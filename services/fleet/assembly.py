"""The whole REST app of a fleet from its settings: score, jobs, the cosmos-rl routes, the page, keys, draining. No Ray here."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI
from starlette.middleware import Middleware

from services.backend import ScoreBackend
from services.config import FleetConfig
from services.jobs.api import Jobs, jobs_router, make_store
from services.jobs.cosmos import cosmos_router
from services.jobs.store import RedisIdempotency
from services.page.router import page_router
from services.rest.auth import Keyring, load_keys
from services.rest.draining import Drain, DrainGate
from services.rest.idempotency import IdempotencyStore
from services.rest.ingress import make_app
from services.rest.metrics import FleetMetrics
from services.rest.scoring import load_decoder


@dataclass(frozen=True)
class Assembled:
    """The app, its jobs, and the handle to drain it."""

    app: FastAPI
    drain: Drain
    jobs: Jobs


def assemble(config: FleetConfig, backend: ScoreBackend, metrics: FleetMetrics, behind_serve: bool = False) -> Assembled:
    """The app of ``config`` over ``backend``. Raises ``KeysError``, or ``ValueError`` for a decoder that is not there."""
    keyring: Keyring | None = load_keys(config.keys_file)
    limits, url = config.limits, config.redis_url
    idempotency: IdempotencyStore | None = None if url is None else RedisIdempotency(url, limits.idempotency_ttl_s, limits.idempotency_bytes)
    jobs, drain = Jobs(make_store(url, config.jobs)), Drain()
    decoder = load_decoder(config.decoder)
    app = make_app(
        backend,
        limits,
        keyring=keyring,
        metrics=metrics,
        idempotency=idempotency,
        decoder=decoder,
        routers=[cosmos_router(jobs, {name: reward.kind for name, reward in config.rewards.items()}), jobs_router(jobs), page_router(jobs)],
        hosts=config.hosts,
        behind_serve=behind_serve,
    )
    app.user_middleware.append(Middleware(DrainGate, drain=drain))  # innermost: inside the guard
    return Assembled(app, drain, jobs)
