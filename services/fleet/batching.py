"""Batches by cost, formed at the moment the engine is free. Asyncio only; the engine is a function that runs in one thread.

Serve's own batching closes a batch ``batch_wait_s`` after its first request even while the engine is busy, so that under load
batches stay small and wait in line; here whatever came in during one call makes up the next.

Lifecycle of a part: ``Batcher.add`` → waits (first come, first served) → taken with its neighbours as soon as the engine is
free and the batch is full or the oldest part has waited ``wait_s`` → its own slice of the results. Invariants: a batch holds
at most ``max_items`` items of together at most ``max_cost`` (a dearer part is a batch by itself); nothing is overtaken; a part
whose caller has gone is dropped before it costs anything.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media

Results = list[ItemScore | ScoreFailure]
Work = Callable[[list[str], list[Media]], Results]


@dataclass(frozen=True)
class Part:
    """What of a request goes into one batch."""

    prompts: list[str]
    media: list[Media]
    cost: int

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Load:
    """Parts inside a batcher: waiting for a batch, and in the batch being scored."""

    waiting: int
    scoring: int


@dataclass
class _Waiting:
    part: Part
    answer: asyncio.Future[Results]
    since: float


def cut(prompts: Sequence[str], media: Sequence[Media], costs: Sequence[int], max_items: int, max_cost: int) -> list[Part]:
    """Consecutive parts that each fit a batch, a dear item alone.

    Worked example: costs 4, 4, 9, 1, 1 with at most 3 items and a cost of 8 give parts of 2, 1 and 2 items.
    """
    parts: list[Part] = []
    start, spent = 0, 0
    for i, cost in enumerate(costs):
        if i > start and (i - start == max_items or spent + cost > max_cost):
            parts.append(Part(list(prompts[start:i]), list(media[start:i]), spent))
            start, spent = i, 0
        spent += cost
    return [*parts, Part(list(prompts[start:]), list(media[start:]), spent)]


class Batcher:
    """A queue in front of ``work``. Use it from one event loop; it starts working at the first ``add``."""

    def __init__(self, work: Work, max_items: int, max_cost: int, wait_s: float, name: str = "batch") -> None:
        self._work, self.max_items, self.max_cost, self._wait_s = work, max_items, max_cost, wait_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._queue: deque[_Waiting] = deque()
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._scoring = 0

    def load(self) -> Load:
        """What is inside now."""
        return Load(len(self._queue), self._scoring)

    async def add(self, part: Part) -> Results:
        """Results of ``part``, in order. Cancelling the call takes the part out if it still waits."""
        loop = asyncio.get_running_loop()
        if self._loop_task is None:
            self._loop_task = loop.create_task(self._run())
        waiting = _Waiting(part, loop.create_future(), loop.time())
        self._queue.append(waiting)
        self._arrived.set()
        return await waiting.answer

    async def _run(self) -> None:
        while True:
            await self._gather()
            batch = self._take()
            if batch:
                await self._score(batch)

    async def _gather(self) -> None:
        """Return when there is a batch to take: it is full, or its oldest part has waited long enough."""
        loop = asyncio.get_running_loop()
        while True:
            self._arrived.clear()
            if self._queue and self._full():
                return
            patience = self._queue[0].since + self._wait_s - loop.time() if self._queue else None
            if patience is not None and patience <= 0:
                return
            try:
                async with asyncio.timeout(patience):
                    await self._arrived.wait()
            except TimeoutError:
                return

    def _full(self) -> bool:
        items = cost = 0
        for waiting in self._queue:
            items, cost = items + len(waiting.part), cost + waiting.part.cost
            if items >= self.max_items or cost >= self.max_cost:
                return True
        return False

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        items = cost = 0
        while self._queue:
            part = self._queue[0].part
            if self._queue[0].answer.cancelled():
                self._queue.popleft()
                continue
            if batch and (items + len(part) > self.max_items or cost + part.cost > self.max_cost):
                break
            items, cost = items + len(part), cost + part.cost
            batch.append(self._queue.popleft())
        return batch

    async def _score(self, batch: list[_Waiting]) -> None:
        prompts = [prompt for waiting in batch for prompt in waiting.part.prompts]
        media = [item for waiting in batch for item in waiting.part.media]
        self._scoring = len(batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, self._work, prompts, media)
        except Exception as error:
            for waiting in batch:
                if not waiting.answer.done():
                    waiting.answer.set_exception(error)
            return
        finally:
            self._scoring = 0
        start = 0
        for waiting in batch:
            if not waiting.answer.done():
                waiting.answer.set_result(results[start : start + len(waiting.part)])
            start += len(waiting.part)
