"""Starting what is missing and joining what is given: Ray, Redis, the reward fleet. Each part undoes itself.

Every function registers its clean-up on the ExitStack it is handed before it returns, so whatever stops a run (an
error, Ctrl-C, the end) takes down exactly what the run started, in reverse order.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from replay.buffer import BufferSettings
from replay.config import RedisConfig
from replay.connect import connect
from replay.embedded import EmbeddedRedis, refuse_several_nodes
from replay.errors import ReplayError
from services.client.base import RewardError, ScoreFailure
from services.client.connect import connect as connect_rewards
from trainer.config.run import RayConfig, RunConfig
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder
from trainer.run.local_ray import free_ports, own_folder, sweep

PROMPTS_TRIED = 4
"""Training prompts, and as many held-out ones, that the reward must take before a run starts."""
DEPLOY_MARGIN_S = 90.0
"""What the task that deploys the fleet may take beside the fleet's own deadline."""


def start_ray(config: RayConfig, stack: ExitStack) -> None:
    """Join `config.address`, or start a local cluster. Raises RunFailed. See `trainer.run.environment`."""
    import ray

    logging.getLogger("ray").setLevel(logging.ERROR)
    common: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR, "configure_logging": True}
    try:
        if config.address is None:
            sweep()
            own = own_folder(stack)
            with free_ports():
                # "local" starts a new cluster even where RAY_ADDRESS names another
                ray.init(
                    "local",
                    num_cpus=config.cpus,
                    include_dashboard=False,
                    object_store_memory=config.object_store_mb << 20,
                    _temp_dir=str(own),
                    **common,
                )
        else:
            ray.init(config.address, **common)
    except Exception as error:
        where = "a local Ray cluster did not start" if config.address is None else f"cannot join Ray at {config.address}"
        raise RunFailed("Ray", f"{where}: {describe(error)}") from error
    stack.callback(ray.shutdown)


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


def check_nodes(config: RunConfig) -> None:
    """Refuse an embedded Redis on several nodes. Raises RunFailed. Ray must be up."""
    if config.redis.url != "embedded":
        return
    import ray

    try:
        refuse_several_nodes(len([node for node in ray.nodes() if node["Alive"]]))
    except ReplayError as error:
        raise RunFailed("Redis", str(error)) from error


def check_reward_url(config: RunConfig) -> None:
    """Score test pictures at a given reward URL. Raises RunFailed."""
    if config.reward.url is None:
        return
    try:
        with contextlib.closing(connect_rewards(config.reward)) as client:
            client.check()
        trouble = refused_prompt(config)
    except RewardError as error:
        raise RunFailed("reward", str(error)) from error
    if trouble is not None:
        raise RunFailed("reward", trouble)


def refused_prompt(config: RunConfig) -> str | None:
    """Why the reward takes one of the run's first prompts for no picture at all; None when it takes them. Raises RewardError."""
    import numpy as np

    from actors.sources.prompts import held_out_prompts, training_prompt

    prompts = [training_prompt(config.prompts, config.seed, group) for group in range(PROMPTS_TRIED)] if config.uses_policy else []
    prompts += held_out_prompts(config.prompts, "test", min(PROMPTS_TRIED, config.evaluation.test_prompts))
    pictures = np.full((len(prompts), config.sampler.height, config.sampler.width, 3), 127, np.uint8)
    with contextlib.closing(connect_rewards(config.reward)) as client:
        scores = client.score(config.reward.model, prompts, pictures, config.reward.timeout_s)
    for prompt, score in zip(prompts, scores, strict=True):
        if isinstance(score, ScoreFailure) and not score.retryable:
            return f"{config.reward.model} cannot score the prompt {prompt!r}: {score.message}; change the prompts or the reward"
    return None


class Fleet:
    """The reward fleet of a run: deployed by a Ray task while the driver goes on, or a URL that was given.

    A task, because a thread of the driver would go on calling Ray while Ray is shut down. With a local cluster the fleet ends as
    Ray does; what stands in a cluster that was joined outlives this driver, so all of Serve is taken down if this run started it,
    else the run's application.
    """

    def __init__(self, config: RunConfig, stack: ExitStack) -> None:
        self.config = config
        self._task: Any = None
        if config.reward.url is not None:
            return
        import ray

        if config.ray.address is not None:
            ours = not any(actor["namespace"] == "serve" for actor in ray.util.list_named_actors(all_namespaces=True))
            stack.callback(_quietly, stop_serve if ours else stop_application)
        self._task = ray.remote(_deploy).options(num_cpus=0, max_retries=0).remote(config)

    def wait(self) -> str:
        """URL of the fleet, once it scores. Raises RunFailed."""
        if self._task is None:
            assert self.config.reward.url is not None
            return self.config.reward.url
        import ray

        try:
            url: str
            url, trouble = ray.get(self._task, timeout=self.config.reward.start_timeout_s + DEPLOY_MARGIN_S)
        except Exception as error:
            raise RunFailed("reward fleet", describe(error)) from error
        if trouble is not None:
            raise RunFailed("reward", trouble)
        return url


def _deploy(config: RunConfig) -> tuple[str, str | None]:
    """URL of the fleet, and the prompt that its reward does not take."""
    from services.fleet import start_fleet
    from services.fleet_config import one_reward

    return start_fleet(one_reward(config.reward)), refused_prompt(config)


def stop_serve() -> None:
    """Take Serve down, with everything on it."""
    from ray import serve

    serve.shutdown()


def stop_application() -> None:
    """Take the run's application down."""
    from services.fleet import stop_fleet

    stop_fleet()


def _quietly(action: Callable[[], object]) -> None:
    """Run a clean-up whose failure must not hide what happened before."""
    with contextlib.suppress(Exception):
        action()


def buffer_settings(config: RunConfig) -> BufferSettings:
    """What the run asks of the replay buffer."""
    return BufferSettings(
        groups_per_step=config.rollout.groups_per_step if config.uses_policy else 0,
        data_per_step=1 if config.uses_data else 0,
        max_staleness=config.replay.max_staleness,
        window=config.replay.window,
        lease_s=config.replay.lease_s,
        max_attempts=config.replay.max_attempts,
        max_bytes=config.replay.max_bytes,
        data_depth=config.replay.data_depth,
        checkpoint_interval=config.checkpoint_every,
        drop_zero_variance=config.replay.drop_zero_variance,
        # a strictly ordered run must not leave holes in the sequence of prompts when it goes back to a checkpoint
        remake_cut_off=config.replay.max_staleness == 0 and config.replay.window == 1,
    )
