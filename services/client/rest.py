"""Scoring over REST from anywhere: needs httpx and numpy, neither Ray nor torch.

Images travel as multipart uploads: one npy array per request (exact, cheap to decode), or PNG files (exact,
smaller, slower to encode). 408, 429, 5xx and transport errors are tried again with jittered backoff until the
deadline, honouring ``Retry-After``; any other refusal, or an answer that is not the contract's, ends the call
at once.
"""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from typing import Literal

import httpx
import numpy as np
from pydantic import ValidationError

from services.client.base import Batch, Image, ItemScore, RewardUnavailable, ScoreFailure, as_media, probe
from services.client.retry import Backoff, retry_after_seconds
from services.schemas import ModelInfo, ModelList, Problem, Score, ScoreResponse

Upload = tuple[str, tuple[str, bytes, str]]


class RestRewardClient:
    """Client of a reward service at ``url`` (base URL, without ``/v1``)."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str = "ocr",
        encoding: Literal["npy", "png"] = "npy",
        chunk_items: int = 64,
        chunk_bytes: int = 16 * 2**20,
        check_timeout_s: float = 20.0,
    ) -> None:
        self._url, self._model, self._encoding = url.rstrip("/"), model, encoding
        self._chunk_items, self._chunk_bytes = chunk_items, chunk_bytes
        self._check_timeout_s = check_timeout_s
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(headers=headers, follow_redirects=False)

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """See ``RewardClient.score``. Large batches go out as several requests under the one deadline."""
        items = as_media(prompts, media, fps)
        if not items:
            return []
        images = np.stack([item.pixels for item in items])
        backoff = Backoff(timeout_s)
        step = max(1, min(self._chunk_items, self._chunk_bytes // max(1, images[:1].nbytes)))
        out: list[ItemScore | ScoreFailure] = []
        for s in range(0, len(images), step):
            part = images[s : s + step]
            fields: dict[str, str | list[str]] = {"model": model, "prompt": list(prompts[s : s + step])}
            answer = self._send("POST", "/v1/score", backoff, timeout_s, fields, self._encode(part))
            try:
                results = ScoreResponse.model_validate_json(answer.content, extra="ignore").results
            except ValidationError as error:
                raise self._not_the_contract(answer, error) from error
            if len(results) != len(part):
                raise self._unavailable(f"{len(results)} results for {len(part)} images", answer.status_code)
            out.extend(map(_from_wire, results))
        return out

    def check(self) -> ModelInfo:
        """See ``RewardClient.check``."""
        backoff = Backoff(self._check_timeout_s)
        answer = self._send("GET", "/v1/models", backoff, self._check_timeout_s)
        try:
            models = ModelList.model_validate_json(answer.content, extra="ignore").models
        except ValidationError as error:
            raise self._not_the_contract(answer, error) from error
        info = next((m for m in models if m.name == self._model), None)
        if info is None:
            names = ", ".join(m.name for m in models) or "none"
            raise RewardUnavailable(self._url, f"it has no model {self._model!r}", f"Set reward.model to one of: {names}.", 200)
        result = self.score(self._model, *probe(info), self._check_timeout_s)[0]
        if isinstance(result, ScoreFailure):
            raise self._unavailable(f"the test image failed ({result.code}): {result.message}", 200)
        return info

    def close(self) -> None:
        """Close the connection pool."""
        self._http.close()

    def _send(
        self,
        verb: Literal["GET", "POST"],
        path: str,
        backoff: Backoff,
        timeout_s: float,
        fields: dict[str, str | list[str]] | None = None,
        files: list[Upload] | None = None,
    ) -> httpx.Response:
        """One request, repeated while repeating can help; returns a 200 answer or raises."""
        while True:
            status, floor_s = None, 0.0
            try:
                answer = self._http.request(verb, self._url + path, data=fields, files=files, timeout=max(0.001, backoff.remaining()))
            except httpx.TransportError as error:
                what = f"cannot be reached ({type(error).__name__}: {error})"
            else:
                if answer.status_code == 200:
                    return answer
                status, what = answer.status_code, _refusal(answer)
                if status not in (408, 429) and status < 500:
                    raise self._unavailable(what, status)
                floor_s = retry_after_seconds(answer.headers.get("retry-after"))
            wait = backoff.next_wait(floor_s)
            if wait is None:
                raise self._unavailable(f"{what}, {backoff.attempts} attempts in {timeout_s:g} s", status)
            time.sleep(wait)

    def _encode(self, images: Image) -> list[Upload]:
        if self._encoding == "npy":
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(images), allow_pickle=False)
            return [("file", ("images.npy", buffer.getvalue(), "application/octet-stream"))]
        from PIL import Image as PILImage

        uploads: list[Upload] = []
        for i, image in enumerate(images):
            buffer = io.BytesIO()
            PILImage.fromarray(image).save(buffer, "PNG", compress_level=1)
            uploads.append(("file", (f"{i}.png", buffer.getvalue(), "image/png")))
        return uploads

    def _unavailable(self, what: str, status: int | None) -> RewardUnavailable:
        if status is None:
            advice = "Check that the service runs and that reward.url names its host and port."
        elif status in (401, 403):
            advice = "Set reward.api_key_env to the variable that holds a valid key."
        elif status == 404:
            advice = "Check reward.url (base URL, without /v1) and reward.model."
        elif status in (408, 429, 503, 504):
            advice = "The service is overloaded: add replicas there, or raise reward.timeout_s."
        elif status >= 500:
            advice = "Look into the service's log; unset reward.url to start a fleet inside this run."
        else:
            advice = "Check that reward.url points at a reward service of this version."
        return RewardUnavailable(self._url, what, advice, status)

    def _not_the_contract(self, answer: httpx.Response, error: ValidationError) -> RewardUnavailable:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        return self._unavailable(f"its answer is not the reward contract: {first['msg']}", answer.status_code)


def _refusal(answer: httpx.Response) -> str:
    """One line about a status that is not 200."""
    try:
        problem = Problem.model_validate_json(answer.content, extra="ignore")
    except ValidationError:
        return f"answered HTTP {answer.status_code}"
    return f"answered HTTP {answer.status_code} ({problem.code}: {problem.detail})"


def _from_wire(score: Score) -> ItemScore | ScoreFailure:
    if score.error is not None:
        return ScoreFailure(score.error.code, score.error.message, score.error.retryable)
    assert score.reward is not None
    assert score.scores is not None
    return ItemScore(score.reward, dict(score.scores), score.text)
