"""Scoring over REST from anywhere: needs httpx and numpy (safetensors and Pillow for those encodings), neither Ray nor torch.

408, 409, 429, 5xx and transport errors are tried again with jittered backoff until the deadline, honouring
``Retry-After`` and repeating the idempotency key; any other refusal, or an answer that is not the contract's, ends the
call at once. Of a clip only the frames that the reward looks at are sent. ``services.client.aio`` is the same for asyncio.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import httpx

from services.client import wire
from services.client.base import Batch, as_media, probe
from services.client.retry import Backoff
from services.client.wire import Encoding, MultiScores, Settings
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media
from services.rest.schemas import Combine, MultiScoreResponse, ScoreOptions


class RestRewardClient:
    """Client of a reward service at ``url`` (base URL, without ``/v1``). Thread-safe."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str = "ocr",
        encoding: Encoding = "npy",
        chunk_items: int = 64,
        chunk_bytes: int = 16 * 2**20,
        check_timeout_s: float = 20.0,
    ) -> None:
        self._url, self._model, self._check_timeout_s = url.rstrip("/"), model, check_timeout_s
        self._settings = Settings(encoding, chunk_items, chunk_bytes)
        self._models: dict[str, ModelInfo] = {}
        self._http = httpx.Client(headers={"Authorization": f"Bearer {api_key}"} if api_key else {}, follow_redirects=False)

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``. Large batches go out as several requests under the one deadline."""
        backoff = Backoff(timeout_s)
        items = self._reduced([model], as_media(prompts, media, fps), backoff, timeout_s)
        out: list[ItemScore | ScoreFailure] = []
        for part in wire.parts(ScoreOptions(model=model), prompts, items, self._settings):
            out += wire.read_scores(self._url, self._send("POST", "/v1/score", backoff, timeout_s, part), part.count)
        return out

    def score_many(
        self, rewards: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None, combine: Combine | None = None
    ) -> MultiScores:
        """Score with several rewards at once; ``combine`` adds one total per item."""
        backoff = Backoff(timeout_s)
        items = self._reduced(rewards, as_media(prompts, media, fps), backoff, timeout_s)
        answers = [
            wire.read_multi(self._url, self._send("POST", "/v1/score", backoff, timeout_s, part), part.count)
            for part in wire.parts(wire.options_for(rewards, combine), prompts, items, self._settings)
        ]
        return wire.joined(answers) if answers else MultiScores({name: [] for name in rewards}, None if combine is None else [])

    def score_files(self, rewards: Sequence[str], prompts: Sequence[str], files: Sequence[tuple[str, bytes]], timeout_s: float) -> MultiScoreResponse:
        """Score files, (name, bytes) each, as they are; one prompt per file. Raises ``RewardUnavailable``."""
        part = wire.file_part(rewards, prompts, files)
        return wire.read_answer(self._url, self._send("POST", "/v1/score", Backoff(timeout_s), timeout_s, part))

    def models(self, timeout_s: float) -> dict[str, ModelInfo]:
        """What the service offers, by name. Raises ``RewardUnavailable``."""
        self._models = wire.read_models(self._url, self._send("GET", "/v1/models", Backoff(timeout_s), timeout_s))
        return self._models

    def check(self) -> ModelInfo:
        """See ``RewardClient.check``."""
        info = wire.named(self._url, self.models(self._check_timeout_s), self._model)
        result = self.score(self._model, *probe(info), self._check_timeout_s)[0]
        if isinstance(result, ScoreFailure):
            raise wire.unavailable(self._url, f"the test item failed ({result.code}): {result.message}", 200)
        return info

    def close(self) -> None:
        """Close the connection pool."""
        self._http.close()

    def _reduced(self, rewards: Sequence[str], items: list[Media], backoff: Backoff, timeout_s: float) -> list[Media]:
        if not any(item.is_video and not item.selected for item in items):
            return items
        if any(name not in self._models for name in rewards):
            self._models = wire.read_models(self._url, self._send("GET", "/v1/models", backoff, timeout_s))
        return wire.reduced(items, [wire.named(self._url, self._models, name).frame_spec for name in rewards])

    def _send(self, verb: str, path: str, backoff: Backoff, timeout_s: float, part: wire.Part | None = None) -> httpx.Response:
        """One request, repeated while repeating can help; returns a 200 answer or raises."""
        exchange = wire.Exchange(self._url, backoff, timeout_s)
        arguments = {} if part is None else dict(part.arguments)
        headers = arguments.pop("headers", {})
        while True:
            try:
                answer = self._http.request(verb, self._url + path, headers={**headers, **exchange.deadline_header()}, **arguments, **exchange.limits())
            except httpx.TransportError as error:
                wait: float | None = exchange.unreachable(error)
            else:
                wait = exchange.answered(answer)
                if wait is None:
                    return answer
            time.sleep(wait or 0.0)
