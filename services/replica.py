"""One Serve deployment per reward: a scorer behind a queue that gathers requests into batches.

Lifecycle of a request: ``score(chunk)`` → what the scorer cannot take is a typed failure at once → the rest is cut into parts
that fit a batch → ``services.batching`` → results in the order of the request. Invariants: the scorer runs in one thread and
never on the event loop, so a slow engine cannot delay health checks or the gathering of the next batch; an item on which the
scorer fails is a typed failure of that item alone.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any

from ray.util import metrics

from services import frames
from services.batching import Batcher, Load, Results, cut
from services.client.base import Media, ScoreFailure
from services.client.handle import ScoreChunk
from services.schemas import ModelInfo
from services.scorers.base import Scorer
from services.scorers.registry import build_scorer, parse_reward

logger = logging.getLogger(__name__)

SCORER_ERROR, WRONG_MEDIA, TOO_FEW_FRAMES = "scorer_error", "media_not_supported", "too_few_frames"


def score_apart(scorer: Scorer, prompts: Sequence[str], media: Sequence[Media]) -> Results:
    """One result per item whatever the scorer does: when a batch raises, its items are scored one by one."""
    try:
        results = scorer.score(prompts, media)
        if len(results) == len(prompts):
            return list(results)
        logger.error("the scorer gave %d results for %d items", len(results), len(prompts))
    except Exception:
        logger.exception("the scorer failed on a batch of %d", len(prompts))
    if len(prompts) == 1:
        return [ScoreFailure(SCORER_ERROR, "the scorer failed on this item")]
    return [result for prompt, item in zip(prompts, media, strict=True) for result in score_apart(scorer, [prompt], [item])]


def acceptable(scorer: Scorer, item: Media) -> Media | ScoreFailure:
    """The item with the frames the scorer looks at, or why it cannot be judged."""
    kind = "video" if item.is_video else "image"
    if kind not in scorer.media:
        return ScoreFailure(WRONG_MEDIA, f"this reward scores {' and '.join(scorer.media)}s, not {kind}s")
    try:
        return frames.take(scorer.frame_spec, item)
    except frames.TooFewFrames as error:
        return ScoreFailure(TOO_FEW_FRAMES, str(error))


class ScorerReplica:
    """A loaded scorer. Construction fails, and with it the deployment, unless the self-test passes."""

    def __init__(self, name: str, entry: dict[str, Any]) -> None:
        settings = parse_reward(entry)
        self._name = name
        self._scorer = build_scorer(settings)
        self._scorer.self_test()
        self._max_items, self._max_cost = settings.batch_items, settings.batch_cost
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
        accepted = await asyncio.to_thread(lambda: [acceptable(self._scorer, item) for item in chunk.media])  # picking frames copies
        good = [(prompt, item) for prompt, item in zip(chunk.prompts, accepted, strict=True) if isinstance(item, Media)]
        scored: Results = []
        if good:
            prompts, media = [prompt for prompt, _ in good], [item for _, item in good]
            parts = cut(prompts, media, [self._scorer.cost(item) for item in media], self._max_items, self._max_cost)
            scored = [result for done in await asyncio.gather(*map(self._batcher.add, parts)) for result in done]
        answers = iter(scored)
        return [item if isinstance(item, ScoreFailure) else next(answers) for item in accepted]

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
