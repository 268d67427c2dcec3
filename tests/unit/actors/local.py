"""Actors without Ray: a handle whose `.remote` runs in a thread, and a generator that asks no ledger."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from actors.config import DataConfig, PromptConfig, RolloutConfig
from actors.rewards import RunRewards
from actors.rollout import RolloutGenerator, RolloutSpec
from diffusion.config import ModelConfig, SamplerConfig
from services.config import FleetConfig

NO_REWARDS = RunRewards(FleetConfig(url="http://127.0.0.1:9"), "rewards")


class Reference:
    """What `.remote` returns."""

    def __init__(self, future: Future[Any]) -> None:
        self._future = future

    def future(self) -> Future[Any]:
        return self._future


class _Method:
    def __init__(self, submit: Callable[..., Future[Any]]) -> None:
        self._submit = submit

    def options(self, max_task_retries: int) -> _Method:
        assert max_task_retries == 0
        return self

    def remote(self, *arguments: Any) -> Reference:
        return Reference(self._submit(*arguments))


class Local:
    """A handle of a plain object, with as many threads as an actor has."""

    def __init__(self, actor: Any, threads: int = 4) -> None:
        self.actor, self._pool = actor, ThreadPoolExecutor(threads)
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> _Method:
        def submit(*arguments: Any) -> Future[Any]:
            self.asked.append((name, arguments))
            return self._pool.submit(getattr(self.actor, name), *arguments)

        return _Method(submit)


class Nobody:
    """A ledger that grants nothing."""

    wait_s = 5.0

    class settings:
        lease_s = 60.0

    def buffer(self) -> Nobody:
        return self


def idle_generator(
    model: ModelConfig,
    sampler: SamplerConfig,
    data: DataConfig = DataConfig(),  # noqa: B008  # frozen
    rollout: RolloutConfig = RolloutConfig(),  # noqa: B008  # frozen
) -> RolloutGenerator:
    """A generator whose loop does not run, as in a run without rollouts."""
    spec = RolloutSpec(0, model, sampler, rollout, PromptConfig(), data, Nobody(), NO_REWARDS)  # type: ignore[arg-type]
    return RolloutGenerator(spec, None, 0)
