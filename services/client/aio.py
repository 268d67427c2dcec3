"""The REST client for asyncio; see ``rest`` for what is retried, ``session`` for the calls and ``wire`` for what is sent.

The requests of a large batch go out side by side, at most ``concurrency`` at a time. Cancelling a call closes its
connections, and the service gives its work up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TypeVar

import httpx

from services.client import wire
from services.client.base import Batch
from services.client.retry import Backoff
from services.client.session import Ask, Session, Steps
from services.client.wire import Encoding, Keys, MultiScores, Settings
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.rest.schemas import Combine

T = TypeVar("T")


class AsyncRewardClient:
    """Client of a reward service at ``url`` (base URL, without ``/v1``); belongs to one event loop."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        encoding: Encoding = "npy",
        chunk_items: int = 64,
        chunk_bytes: int = 16 * 2**20,
        concurrency: int = 8,
        check_timeout_s: float = 20.0,
        connect_s: float | None = None,
        keys: Keys = Keys(),  # noqa: B008
    ) -> None:
        self._session = Session(url, Settings(encoding, chunk_items, chunk_bytes), keys)
        self._check_timeout_s, self._connect_s = check_timeout_s, connect_s
        self._gate = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, follow_redirects=False)

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``."""
        return await self._run(self._session.one(model, prompts, media, fps), timeout_s)

    async def score_all(
        self, names: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        """See ``RewardClient.score_all``."""
        return await self._run(self._session.all(names, prompts, media, fps), timeout_s)

    async def score_many(
        self, rewards: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None, combine: Combine | None = None
    ) -> MultiScores:
        """Score with several rewards at once; ``combine`` adds one total per item."""
        return await self._run(self._session.many(rewards, prompts, media, fps, combine), timeout_s)

    async def models(self, timeout_s: float) -> dict[str, ModelInfo]:
        """What the service offers, by name. Raises ``RewardUnavailable``."""
        return await self._run(self._session.models(), timeout_s)

    async def info(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.info``."""
        return await self._run(self._session.info(names), self._check_timeout_s)

    async def check(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.check``."""
        return await self._run(self._session.check(names), self._check_timeout_s)

    async def close(self) -> None:
        """Close the connection pool."""
        await self._http.aclose()

    async def _run(self, steps: Steps[T], timeout_s: float) -> T:
        """A call's requests side by side; the first that fails for good cancels the others."""
        end = time.monotonic() + timeout_s
        try:
            asks = next(steps)
            while True:
                asks = steps.send(await self._all(asks, end, timeout_s))
        except StopIteration as done:
            result: T = done.value
            return result

    async def _all(self, asks: Sequence[Ask], end: float, timeout_s: float) -> list[httpx.Response]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._send(ask, end, timeout_s)) for ask in asks]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _send(self, ask: Ask, end: float, timeout_s: float) -> httpx.Response:
        """One request, repeated while repeating can help; returns a 200 answer or raises."""
        arguments = {} if ask.part is None else dict(ask.part.arguments)
        headers = arguments.pop("headers", {})
        async with self._gate:
            backoff = Backoff(max(0.0, end - time.monotonic()))
            exchange = wire.Exchange(self._session.url, backoff, timeout_s, self._session.keys, self._connect_s)
            while True:
                more = {**arguments, "headers": {**headers, **exchange.deadline_header()}}
                try:
                    async with asyncio.timeout(backoff.remaining()):  # httpx' own limits start anew with every chunk of an answer
                        answer = await self._http.request(ask.verb, self._session.url + ask.path, **more, timeout=exchange.limits())
                except TimeoutError:
                    wait: float | None = exchange.unreachable(httpx.ReadTimeout("no answer in time"))
                except httpx.TransportError as error:
                    wait = exchange.unreachable(error)
                else:
                    wait = exchange.answered(answer)
                    if wait is None:
                        return answer
                await asyncio.sleep(wait or 0.0)
