"""A fleet as a Serve application: one deployment per reward, and the REST ingress in front of them where somebody calls over HTTP."""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve.schema import LoggingConfig

from services.config import FleetConfig
from services.fleet.replica import ScorerReplica
from services.scorers.settings import RewardSettings

INGRESS = "ingress"
QUIET = LoggingConfig(enable_access_log=False)
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_THREAD_LIMIT")


def build_app(config: FleetConfig, http: bool = True) -> serve.Application:
    """The Serve application. Without ``http`` there is no ingress: the rewards are reached through their handles alone."""
    names = list(config.rewards)
    if not http:
        # A Serve application is what one deployment binds: the first reward binds the others.
        others = [_scorer_deployment(name, config.rewards[name]) for name in names[1:]]
        return _scorer_deployment(names[0], config.rewards[names[0]], *others)
    from services.fleet.ingress_replica import Ingress  # FastAPI: not for a fleet without HTTP

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
    application: serve.Application = ingress.bind(config.model_dump(mode="json"), *(_scorer_deployment(name, config.rewards[name]) for name in names))
    return application


def _scorer_deployment(name: str, reward: RewardSettings, *others: serve.Application) -> serve.Application:
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
    application: serve.Application = deployment.bind(name, reward.model_dump(mode="json"), *others)
    return application


def _runtime_env(threads: int) -> dict[str, Any]:
    """The job's runtime environment plus thread caps, as replicas are the unit of parallelism; Serve by itself would keep
    only its working_dir."""
    job: dict[str, Any] = dict(ray.get_runtime_context().runtime_env) if ray.is_initialized() else {}
    return {**job, "env_vars": {**job.get("env_vars", {}), **dict.fromkeys(THREAD_VARIABLES, str(threads))}}
