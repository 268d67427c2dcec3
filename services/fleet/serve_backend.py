"""``ScoreBackend`` over Serve handles: what an ingress process does with the scorer deployments.

Lifecycle of a call: media → chunks that each fit a batch → one handle call per chunk, all at once → a chunk whose replica dies
is sent again → results in order. Invariants: everything ends at the deadline; scoring has no effects, so a repeat is harmless
and a killed replica costs time, never an error; a refused or cancelled call takes back its other chunks.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from services.client.handle import ScoreChunk, replica_loss_errors
from services.client.retry import Backoff
from services.config import FleetConfig
from services.contract import ItemScore, ModelHealth, ModelInfo, ScoreFailure
from services.errors import ProblemError
from services.fleet.batching import Load, cut
from services.fleet.latency import Latency
from services.media.base import Media
from services.rest.metrics import FleetMetrics

logger = logging.getLogger(__name__)

INFO_TIMEOUT_S, ASK_AGAIN_S = 5.0, 2.0  # a reward that is down must not hold up requests for the others
HEALTH_TTL_S = 1.0
HEALTH_TIMEOUT_S = 2.0


class ServeBackend:
    """The rewards of one fleet, from inside an ingress replica."""

    def __init__(self, config: FleetConfig, metrics: FleetMetrics, app: str) -> None:
        self._config, self._app, self._metrics = config, app, metrics
        self._handles = {name: serve.get_deployment_handle(name, app_name=app) for name in config.rewards}
        self._infos: dict[str, ModelInfo] = {}
        self._info_lock, self._ask_again_at = asyncio.Lock(), 0.0
        self._in_flight: dict[str, int] = defaultdict(int)
        self._latencies = {name: Latency() for name in config.rewards}
        self._health: list[ModelHealth] = []
        self._health_until = 0.0
        self._health_lock = asyncio.Lock()

    async def models(self) -> list[ModelInfo]:
        """See ``ScoreBackend.models``. Answers are kept: revisions change only with a new deployment."""
        async with self._info_lock:  # the first requests come all at once, and must not fill each other's queues
            missing = [name for name in self._handles if name not in self._infos]
            if missing and time.monotonic() >= self._ask_again_at:
                found = await asyncio.gather(*(self._call(name, "info", INFO_TIMEOUT_S) for name in missing), return_exceptions=True)
                self._infos.update({name: info for name, info in zip(missing, found, strict=True) if isinstance(info, ModelInfo)})
                for name, problem in zip(missing, found, strict=True):
                    if isinstance(problem, BaseException):
                        logger.warning("%s does not say what it is: %s", name, problem)
                self._ask_again_at = time.monotonic() + ASK_AGAIN_S
        return [self._infos[name] for name in self._handles if name in self._infos]

    async def score(self, model: str, prompts: list[str], media: list[Media], deadline_s: float) -> list[ItemScore | ScoreFailure]:
        """See ``ScoreBackend.score``."""
        if model not in self._handles:
            raise ProblemError(404, "model_not_found", f"no model {model[:64]!r}; there is {', '.join(self._handles)}")
        reward = self._config.rewards[model]
        limit, started = min(deadline_s, reward.timeout_s), time.monotonic()
        parts = cut(prompts, media, [m.frames.size // 3 for m in media], reward.batch_items, reward.batch_cost)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._call(model, "score", limit, ScoreChunk(part.prompts, part.media))) for part in parts]
        except ExceptionGroup as errors:  # the first chunk that was refused has cancelled the others
            error = next((e for e in errors.exceptions if isinstance(e, ProblemError)), errors.exceptions[0])
            self._metrics.refused(model, error.code if isinstance(error, ProblemError) else "internal_error")
            raise error from None
        seconds = time.monotonic() - started
        results: list[ItemScore | ScoreFailure] = [result for task in tasks for result in task.result()]
        self._latencies[model].add(seconds)
        self._metrics.scored(model, seconds, results)
        return results

    async def health(self) -> list[ModelHealth]:
        """See ``ScoreBackend.health``. At most one look per second at the cluster."""
        async with self._health_lock:
            if time.monotonic() >= self._health_until:
                self._health = await self._look()
                self._health_until = time.monotonic() + HEALTH_TTL_S
                self._metrics.health(self._health)
            return self._health

    async def _look(self) -> list[ModelHealth]:
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                deployments = (await asyncio.to_thread(serve.status)).applications[self._app].deployments
        except (TimeoutError, KeyError, RayError) as error:
            logger.warning("Serve's status is not to be had: %s", type(error).__name__)
            deployments = {}
        loads = await asyncio.gather(*(self._load(name) for name in self._handles))
        return [self._describe(name, deployments.get(name), load) for name, load in zip(self._handles, loads, strict=True)]

    async def _load(self, name: str) -> Load:
        """Requests inside the running replicas; those that do not answer in time count as empty."""
        try:
            found = await self._handles[name].broadcast("load").results_async(timeout_s=HEALTH_TIMEOUT_S, return_exceptions=True)
        except (TimeoutError, DeploymentUnavailableError):  # the latter when no replica is up
            return Load(0, 0)
        loads = [load for load in found if isinstance(load, Load)]
        return Load(sum(load.waiting for load in loads), sum(load.scoring for load in loads))

    def _describe(self, name: str, deployment: Any, load: Load) -> ModelHealth:
        running = None if deployment is None else sum(n for state, n in deployment.replica_states.items() if getattr(state, "value", state) == "RUNNING")
        if running:
            status, message = "ready", None
        elif deployment is None:
            status, message = "unhealthy", "Serve does not answer"
        else:
            starting = deployment.status.value in ("UPDATING", "UPSCALING")
            status, message = ("starting", None) if starting else ("unhealthy", "no replica runs; see the replicas' log")
        return ModelHealth.model_validate(
            {
                "name": name,
                "status": status,
                "replicas": running,
                # what this process has sent and no replica has taken yet waits in the router
                "queued": load.waiting + max(0, self._in_flight[name] - load.waiting - load.scoring),
                "ongoing": load.scoring,
                **self._latencies[name].quantiles(),
                "message": message,
            }
        )

    async def _call(self, name: str, method: str, timeout_s: float, *args: Any) -> Any:
        """One handle call, repeated when its replica dies, until the deadline."""
        lost = replica_loss_errors()
        backoff = Backoff(timeout_s)
        self._in_flight[name] += method == "score"
        try:
            while True:
                response = getattr(self._handles[name], method).remote(*args)
                try:
                    async with asyncio.timeout(backoff.remaining()):
                        return await response
                except lost as error:
                    self._metrics.repeated(name)
                    logger.warning("a replica of %s was lost mid-request (%s), trying again", name, type(error).__name__)
                except TimeoutError:
                    response.cancel()
                    raise ProblemError(504, "deadline_exceeded", f"no score from {name} within {timeout_s:g} s") from None
                except asyncio.CancelledError:
                    response.cancel()
                    raise
                except BackPressureError as error:
                    raise ProblemError(503, "queue_full", f"the queue of {name} is full", retry_after_s=1) from error
                except DeploymentUnavailableError as error:
                    raise ProblemError(503, "scorer_unavailable", f"{name} failed to start", retry_after_s=10) from error
                wait = backoff.next_wait()
                if wait is None:
                    raise ProblemError(503, "scorer_unavailable", f"the replicas of {name} keep dying", retry_after_s=5)
                await asyncio.sleep(wait)
        finally:
            self._in_flight[name] -= method == "score"
