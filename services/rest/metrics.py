"""Figures of one ingress process for Prometheus, in a registry of their own.

Labels come from fixed sets (route templates, statuses, configured rewards, error codes of this package), never from
what a client sent.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.types import Scope

from services.contract import ItemScore, ModelHealth, ScoreFailure

CONTENT_TYPE = CONTENT_TYPE_LATEST
_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class FleetMetrics:
    """Counts requests, scorer calls and items; ``registry`` takes further collectors."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter("ddrl_reward_requests", "HTTP requests.", ("method", "route", "status"), registry=self.registry)
        self._seconds = Histogram("ddrl_reward_request_seconds", "Time to the last byte of an answer.", ("route",), buckets=_BUCKETS, registry=self.registry)
        self._items = Counter("ddrl_reward_items", "Items by outcome: scored, or the code of the failure.", ("model", "outcome"), registry=self.registry)
        self._refused = Counter("ddrl_reward_refused", "Scorer calls that failed as a whole, by code.", ("model", "code"), registry=self.registry)
        self._repeated = Counter("ddrl_reward_repeated", "Scorer calls sent again because a replica was lost.", ("model",), registry=self.registry)
        self._score_seconds = Histogram("ddrl_reward_score_seconds", "Time a scorer call took.", ("model",), buckets=_BUCKETS, registry=self.registry)
        self._ready = Gauge("ddrl_reward_model_ready", "1 when the model can score.", ("model",), registry=self.registry)
        self._replicas = Gauge("ddrl_reward_model_replicas", "Running replicas.", ("model",), registry=self.registry)
        self._queued = Gauge("ddrl_reward_model_queued", "Requests that wait.", ("model",), registry=self.registry)
        self._ongoing = Gauge("ddrl_reward_model_ongoing", "Requests being scored.", ("model",), registry=self.registry)
        self._jobs = Gauge("ddrl_reward_jobs", "Jobs that have not ended, by state.", ("state",), registry=self.registry)
        self._job_bytes = Gauge("ddrl_reward_job_bytes", "Bytes that unfinished jobs hold in Redis.", registry=self.registry)

    def request(self, scope: Scope, status: int, seconds: float) -> None:
        """One finished request; ``status`` 0 when the client left before an answer."""
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests.labels(method, route, str(status or 499)).inc()
        self._seconds.labels(route).observe(seconds)

    def items(self, model: str, results: Iterable[ItemScore | ScoreFailure]) -> None:
        """Outcomes of items, scored or not."""
        for result in results:
            self._items.labels(model, result.code if isinstance(result, ScoreFailure) else "scored").inc()

    def scored(self, model: str, seconds: float, results: Iterable[ItemScore | ScoreFailure]) -> None:
        """One finished call of a scorer."""
        self.items(model, results)
        self._score_seconds.labels(model).observe(seconds)

    def refused(self, model: str, code: str) -> None:
        """One call that failed as a whole."""
        self._refused.labels(model, code).inc()

    def repeated(self, model: str) -> None:
        """One call sent again because its replica was lost."""
        self._repeated.labels(model).inc()

    def health(self, models: Iterable[ModelHealth]) -> None:
        """The state of every model now."""
        for model in models:
            self._ready.labels(model.name).set(model.status == "ready")
            self._replicas.labels(model.name).set(math.nan if model.replicas is None else model.replicas)
            self._queued.labels(model.name).set(model.queued)
            self._ongoing.labels(model.name).set(model.ongoing)

    def jobs(self, counts: Mapping[str, int]) -> None:
        """The jobs now, as ``JobStore.counts`` gives them."""
        for state in ("queued", "running"):
            self._jobs.labels(state).set(counts[state])
        self._job_bytes.set(counts["bytes"])

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)
