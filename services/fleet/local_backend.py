"""``ScoreBackend`` with the scorers in this process: `ddrl score` without a service, tests, and the benchmarks' other side.

Every reward has a thread and a batcher of its own, as a replica has; there is no queue limit and nobody to fail over to.
"""

from __future__ import annotations

import asyncio
import time

from services.contract import ItemScore, ModelHealth, ModelInfo, ScoreFailure
from services.errors import ProblemError
from services.fleet.batching import Batcher, Results
from services.fleet.judging import judge, score_apart
from services.fleet.latency import Latency
from services.media.base import Media
from services.scorers.base import Scorer
from services.scorers.registry import build_scorer
from services.scorers.settings import RewardSettings


class LocalReward:
    """A loaded scorer behind its batcher. Construction loads the weights and runs the self-test."""

    def __init__(self, name: str, settings: RewardSettings) -> None:
        self.settings = settings
        self.scorer: Scorer = build_scorer(settings)
        self.scorer.self_test()
        self.info: ModelInfo = self.scorer.info(name)
        self.latency = Latency()
        self.batcher = Batcher(self._work, settings.batch_items, settings.batch_cost, settings.batch_wait_s, f"score-{name}")

    async def score(self, prompts: list[str], media: list[Media]) -> Results:
        """One result per item."""
        return await judge(self.scorer, self.batcher, prompts, media)

    def _work(self, prompts: list[str], media: list[Media]) -> Results:
        return score_apart(self.scorer, prompts, media)


class LocalBackend:
    """See ``ScoreBackend``. Built outside an event loop or inside; used from one."""

    def __init__(self, rewards: dict[str, RewardSettings]) -> None:
        self._rewards = {name: LocalReward(name, settings) for name, settings in rewards.items()}

    async def models(self) -> list[ModelInfo]:
        """See ``ScoreBackend.models``."""
        return [reward.info for reward in self._rewards.values()]

    async def score(self, model: str, prompts: list[str], media: list[Media], deadline_s: float) -> list[ItemScore | ScoreFailure]:
        """See ``ScoreBackend.score``."""
        if model not in self._rewards:
            raise ProblemError(404, "model_not_found", f"no model {model[:64]!r}; there is {', '.join(self._rewards)}")
        started = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                results = await self._rewards[model].score(prompts, media)
        except TimeoutError:
            raise ProblemError(504, "deadline_exceeded", f"no score from {model} within {deadline_s:g} s") from None
        self._rewards[model].latency.add(time.monotonic() - started)
        return results

    async def health(self) -> list[ModelHealth]:
        """See ``ScoreBackend.health``."""
        return [self._describe(name, reward) for name, reward in self._rewards.items()]

    def _describe(self, name: str, reward: LocalReward) -> ModelHealth:
        load = reward.batcher.load()
        return ModelHealth(name=name, status="ready", replicas=1, queued=load.waiting, ongoing=load.scoring, **reward.latency.quantiles())
