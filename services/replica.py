"""One Serve deployment per reward: a scorer behind a queue that gathers requests into batches.

Lifecycle of a request: ``score(chunk)`` → waits for at most ``batch_wait_s`` for company → scored in one
engine call → its own slice of the results goes back. Invariant: the scorer runs in one thread and never on
the event loop, so a slow engine cannot delay health checks or the gathering of the next batch.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from ray import serve

from services.client.base import ItemScore, ScoreFailure
from services.client.handle import ScoreChunk
from services.config import RewardConfig
from services.schemas import ModelInfo
from services.scorers.registry import make_scorer

Results = list[ItemScore | ScoreFailure]


def _total_items(chunks: list[ScoreChunk]) -> int:
    return sum(len(chunk) for chunk in chunks)


class ScorerReplica:
    """A loaded scorer. Construction fails, and with it the deployment, unless the self-test passes."""

    def __init__(self, model: str, config: RewardConfig) -> None:
        self._scorer = make_scorer(model, config)
        self._scorer.self_test()
        self._max_items = config.max_batch_items
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"score-{model}")
        self._gathered.set_max_batch_size(config.max_batch_items)  # type: ignore[attr-defined]
        self._gathered.set_batch_wait_timeout_s(config.batch_wait_s)  # type: ignore[attr-defined]

    async def info(self) -> ModelInfo:
        """Name, revision and sub-scores of the scorer."""
        return self._scorer.info()

    async def score(self, chunk: ScoreChunk) -> Results:
        """Score a chunk of any size; parts larger than a batch are cut."""
        starts = range(0, len(chunk), self._max_items)
        parts = [ScoreChunk(chunk.prompts[s : s + self._max_items], chunk.media[s : s + self._max_items]) for s in starts]
        done = await asyncio.gather(*(self._gathered(part) for part in parts))
        return [result for part in done for result in part]

    # Size and wait are replaced by the configured ones in __init__.
    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.002, batch_size_fn=_total_items)
    async def _gathered(self, chunks: list[ScoreChunk]) -> list[Results]:
        prompts = [prompt for chunk in chunks for prompt in chunk.prompts]
        media = [item for chunk in chunks for item in chunk.media]
        loop = asyncio.get_running_loop()
        results = await loop.run_in_executor(self._thread, self._scorer.score, prompts, media)
        out, start = [], 0
        for chunk in chunks:
            out.append(results[start : start + len(chunk)])
            start += len(chunk)
        return out
