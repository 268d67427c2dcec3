"""The REST client for asyncio; see ``rest`` for what is retried and ``wire`` for what is sent.

The requests of a large batch go out side by side, at most ``concurrency`` at a time. Cancelling a call closes its
connections, and the service gives its work up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import httpx

from services.client import wire
from services.client.base import Batch, as_media, probe
from services.client.retry import Backoff
from services.client.wire import Encoding, MultiScores, Part, Settings
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media
from services.rest.schemas import Combine, ScoreOptions


class AsyncRewardClient:
    """Client of a reward service at ``url`` (base URL, without ``/v1``); belongs to one event loop."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str = "ocr",
        encoding: Encoding = "npy",
        chunk_items: int = 64,
        chunk_bytes: int = 16 * 2**20,
        concurrency: int = 8,
        check_timeout_s: float = 20.0,
    ) -> None:
        self._url, self._model, self._check_timeout_s = url.rstrip("/"), model, check_timeout_s
        self._settings = Settings(encoding, chunk_items, chunk_bytes)
        self._models: dict[str, ModelInfo] = {}
        self._gate = asyncio.Semaphore(concurrency)
        self._http = httpx.AsyncClient(headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, follow_redirects=False)

    async def __aenter__(self) -> AsyncRewardClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``."""
        deadline = _Deadline(timeout_s)
        items = await self._reduced([model], as_media(prompts, media, fps), deadline)
        parts = wire.parts(ScoreOptions(model=model), prompts, items, self._settings)
        answers = await self._all(parts, deadline)
        return [r for part, answer in zip(parts, answers, strict=True) for r in wire.read_scores(self._url, answer, part.count)]

    async def score_many(
        self, rewards: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None, combine: Combine | None = None
    ) -> MultiScores:
        """Score with several rewards at once; ``combine`` adds one total per item."""
        deadline = _Deadline(timeout_s)
        items = await self._reduced(rewards, as_media(prompts, media, fps), deadline)
        parts = wire.parts(wire.options_for(rewards, combine), prompts, items, self._settings)
        answers = await self._all(parts, deadline)
        read = [wire.read_multi(self._url, answer, part.count) for part, answer in zip(parts, answers, strict=True)]
        return wire.joined(read) if read else MultiScores({name: [] for name in rewards}, None if combine is None else [])

    async def models(self, timeout_s: float) -> dict[str, ModelInfo]:
        """What the service offers, by name. Raises ``RewardUnavailable``."""
        self._models = wire.read_models(self._url, await self._send("GET", "/v1/models", _Deadline(timeout_s)))
        return self._models

    async def check(self) -> ModelInfo:
        """See ``RewardClient.check``."""
        info = wire.named(self._url, await self.models(self._check_timeout_s), self._model)
        result = (await self.score(self._model, *probe(info), self._check_timeout_s))[0]
        if isinstance(result, ScoreFailure):
            raise wire.unavailable(self._url, f"the test item failed ({result.code}): {result.message}", 200)
        return info

    async def close(self) -> None:
        """Close the connection pool."""
        await self._http.aclose()

    async def _all(self, parts: Sequence[Part], deadline: _Deadline) -> list[httpx.Response]:
        """Every part's answer; the first that fails for good cancels the others."""
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._gated(part, deadline)) for part in parts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _gated(self, part: Part, deadline: _Deadline) -> httpx.Response:
        async with self._gate:
            return await self._send("POST", "/v1/score", deadline, part)

    async def _reduced(self, rewards: Sequence[str], items: list[Media], deadline: _Deadline) -> list[Media]:
        if not any(item.is_video and not item.selected for item in items):
            return items
        if any(name not in self._models for name in rewards):
            self._models = wire.read_models(self._url, await self._send("GET", "/v1/models", deadline))
        return wire.reduced(items, [wire.named(self._url, self._models, name).frame_spec for name in rewards])

    async def _send(self, verb: str, path: str, deadline: _Deadline, part: Part | None = None) -> httpx.Response:
        """One request, repeated while repeating can help; returns a 200 answer or raises."""
        backoff = deadline.backoff()
        exchange = wire.Exchange(self._url, backoff, deadline.timeout_s)
        arguments = {} if part is None else dict(part.arguments)
        headers = arguments.pop("headers", {})
        while True:
            try:
                async with asyncio.timeout(backoff.remaining()):
                    answer = await self._http.request(verb, self._url + path, headers={**headers, **exchange.deadline_header()}, **arguments, timeout=None)
            except TimeoutError:
                wait: float | None = exchange.unreachable(httpx.ReadTimeout("no answer in time"))
            except httpx.TransportError as error:
                wait = exchange.unreachable(error)
            else:
                wait = exchange.answered(answer)
                if wait is None:
                    return answer
            await asyncio.sleep(wait or 0.0)


class _Deadline:
    """When a call ends, whatever number of requests it makes."""

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self._end = time.monotonic() + timeout_s

    def backoff(self) -> Backoff:
        """Waits between the attempts of one of its requests."""
        return Backoff(max(0.0, self._end - time.monotonic()))
