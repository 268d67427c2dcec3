"""Scoring over REST from anywhere: needs httpx and numpy (safetensors and Pillow for those encodings), neither Ray nor torch.

408, 409, 429, 5xx and transport errors are tried again with jittered backoff until the deadline, honouring
``Retry-After`` and repeating the idempotency key; any other refusal, or an answer that is not the contract's, ends the
call at once. Of a clip only the frames that the reward looks at are sent. ``services.client.aio`` is the same for asyncio.
"""

from __future__ import annotations

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
from services.rest.schemas import Combine, MultiScoreResponse

T = TypeVar("T")


class RestRewardClient:
    """Client of a reward service at ``url`` (base URL, without ``/v1``). Thread-safe.

    ``connect_s``: how long a service that takes no connection is tried; None: until the deadline. ``keys``: what errors call settings.
    """

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        encoding: Encoding = "npy",
        chunk_items: int = 64,
        chunk_bytes: int = 16 * 2**20,
        check_timeout_s: float = 20.0,
        connect_s: float | None = None,
        keys: Keys = Keys(),  # noqa: B008
    ) -> None:
        self._session = Session(url, Settings(encoding, chunk_items, chunk_bytes), keys)
        self._check_timeout_s, self._connect_s = check_timeout_s, connect_s
        self._http = httpx.Client(headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, follow_redirects=False)

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``. Large batches go out as several requests under the one deadline."""
        return self._run(self._session.one(model, prompts, media, fps), timeout_s)

    def score_all(
        self, names: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        """See ``RewardClient.score_all``."""
        return self._run(self._session.all(names, prompts, media, fps), timeout_s)

    def score_many(
        self, rewards: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None, combine: Combine | None = None
    ) -> MultiScores:
        """Score with several rewards at once; ``combine`` adds one total per item."""
        return self._run(self._session.many(rewards, prompts, media, fps, combine), timeout_s)

    def score_files(self, rewards: Sequence[str], prompts: Sequence[str], files: Sequence[tuple[str, bytes]], timeout_s: float) -> MultiScoreResponse:
        """Score files, (name, bytes) each, as they are; one prompt per file. Raises ``RewardUnavailable``."""
        return self._run(self._session.files(rewards, prompts, files), timeout_s)

    def models(self, timeout_s: float) -> dict[str, ModelInfo]:
        """What the service offers, by name. Raises ``RewardUnavailable``."""
        return self._run(self._session.models(), timeout_s)

    def info(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.info``."""
        return self._run(self._session.info(names), self._check_timeout_s)

    def check(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """See ``RewardClient.check``."""
        return self._run(self._session.check(names), self._check_timeout_s)

    def close(self) -> None:
        """Close the connection pool."""
        self._http.close()

    def _run(self, steps: Steps[T], timeout_s: float) -> T:
        """A call's requests one after the other."""
        backoff = Backoff(timeout_s)
        try:
            asks = next(steps)
            while True:
                asks = steps.send([self._send(ask, backoff, timeout_s) for ask in asks])
        except StopIteration as end:
            result: T = end.value
            return result

    def _send(self, ask: Ask, backoff: Backoff, timeout_s: float) -> httpx.Response:
        """One request, repeated while repeating can help; returns a 200 answer or raises."""
        exchange = wire.Exchange(self._session.url, backoff, timeout_s, self._session.keys, self._connect_s)
        arguments = {} if ask.part is None else dict(ask.part.arguments)
        headers = arguments.pop("headers", {})
        while True:
            try:
                answer = self._http.request(
                    ask.verb, self._session.url + ask.path, headers={**headers, **exchange.deadline_header()}, **arguments, timeout=exchange.limits()
                )
            except httpx.TransportError as error:
                wait: float | None = exchange.unreachable(error)
            else:
                wait = exchange.answered(answer)
                if wait is None:
                    return answer
            time.sleep(wait or 0.0)
