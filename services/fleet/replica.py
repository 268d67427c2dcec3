"""One Serve deployment per reward: a scorer behind a queue that gathers requests into batches.

Lifecycle of a request: ``score(chunk)`` → what the scorer cannot take is a typed failure at once → the rest is cut into parts
that fit a batch → ``services.fleet.batching`` → results in the order of the request. Invariants: the scorer runs in one thread and
never on the event loop, so a slow engine cannot delay health checks or the gathering of the next batch; an item on which the
scorer fails is a typed failure of that item alone.
"""

from __future__ import annotations

import time
from typing import Any

from ray.util import metrics

from services.client.handle import ScoreChunk
from services.contract import ModelInfo, ScoreFailure
from services.fleet.batching import Batcher, Load, Results
from services.fleet.judging import judge, score_apart
from services.media.base import Media
from services.scorers.registry import build_scorer, parse_reward


class ScorerReplica:
    """A loaded scorer. Construction fails, and with it the deployment, unless the self-test passes."""

    def __init__(self, name: str, entry: dict[str, Any], *others: Any) -> None:
        del others  # rewards beside this one, bound to it so that they belong to the application
        settings = parse_reward(entry)
        self._name = name
        self._scorer = build_scorer(settings)
        self._scorer.self_test()
        self._batcher = Batcher(self._work, settings.batch_items, settings.batch_cost, settings.batch_wait_s, f"score-{name}")
        self._items = metrics.Counter("ddrl_reward_items", "Items scored, by outcome.", tag_keys=("reward", "outcome"))
        self._batches = metrics.Counter("ddrl_reward_batches", "Calls of the scorer.", tag_keys=("reward",))
        self._seconds = metrics.Counter("ddrl_reward_busy_seconds", "Seconds the scorer worked.", tag_keys=("reward",))

    async def info(self) -> ModelInfo:
        """Name, revision and sub-scores of the scorer."""
        return self._scorer.info(self._name)

    async def load(self) -> Load:
        """What waits and what is being scored here."""
        return self._batcher.load()

    async def score(self, chunk: ScoreChunk) -> Results:
        """Score a chunk of any size."""
        return await judge(self._scorer, self._batcher, chunk.prompts, chunk.media)

    def _work(self, prompts: list[str], media: list[Media]) -> Results:
        started = time.monotonic()
        results = score_apart(self._scorer, prompts, media)
        tag = {"reward": self._name}
        self._seconds.inc(max(1e-9, time.monotonic() - started), tag)
        self._batches.inc(1, tag)
        failed = sum(isinstance(result, ScoreFailure) for result in results)
        for outcome, count in (("failed", failed), ("scored", len(results) - failed)):
            if count:
                self._items.inc(count, {**tag, "outcome": outcome})
        return results
