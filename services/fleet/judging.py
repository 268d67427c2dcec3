"""One scorer, any items: whatever comes in and whatever the scorer does, there is one result per item. No Ray, no HTTP."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from services.contract import ScoreFailure
from services.fleet.batching import Batcher, Results, cut
from services.media import frames
from services.media.base import Media
from services.scorers.base import Scorer

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


async def judge(scorer: Scorer, batcher: Batcher, prompts: Sequence[str], media: Sequence[Media]) -> Results:
    """Results of any number of items through the scorer's batcher, in order."""
    accepted = [acceptable(scorer, item) if not item.is_video else await asyncio.to_thread(acceptable, scorer, item) for item in media]
    good = [(prompt, item) for prompt, item in zip(prompts, accepted, strict=True) if isinstance(item, Media)]
    scored: Results = []
    if good:
        items = [item for _, item in good]
        parts = cut([prompt for prompt, _ in good], items, [scorer.cost(item) for item in items], batcher.max_items, batcher.max_cost)
        scored = [result for done in await asyncio.gather(*map(batcher.add, parts)) for result in done]
    answers = iter(scored)
    return [item if isinstance(item, ScoreFailure) else next(answers) for item in accepted]
