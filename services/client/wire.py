"""What a REST client sends and how it reads the answer: no sockets here; ``session`` puts it together.

| encoding | media travel as | |
|---|---|---|
| npy | a form with one npy array, or one per item where sizes differ | exact; any service can read it |
| safetensors | one body of tensors | exact, cheapest on both sides |
| png | a form of PNG files, images only | exact, smaller, slower to encode |

What a form cannot say (clips of different frame rates, images beside clips) goes as safetensors. A batch is cut into
requests by items and bytes; each carries an idempotency key that its repeats share.
"""

from __future__ import annotations

import io
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError

from services.client.base import RewardUnavailable
from services.client.retry import Backoff, retry_after_seconds
from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media
from services.rest.schemas import Combine, ModelList, MultiScoreResponse, Problem, Score, ScoreOptions, ScoreResponse, TensorItem, TensorRequest

Upload = tuple[str, tuple[str, bytes, str]]
Schema = TypeVar("Schema", bound=BaseModel)
Encoding = Literal["npy", "safetensors", "png"]


@dataclass(frozen=True)
class Part:
    """One request of a batch: keyword arguments for httpx, and how many items it holds."""

    count: int
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Settings:
    """How a client cuts and encodes. ``chunk_bytes`` counts pixels at 3 bytes each."""

    encoding: Encoding = "npy"
    chunk_items: int = 64
    chunk_bytes: int = 16 << 20


@dataclass(frozen=True)
class Keys:
    """What an error calls the settings that it is about; the defaults are the client's own arguments."""

    url: str = "url"
    api_key: str = "api_key"
    timeout: str = "timeout_s"


@dataclass(frozen=True)
class MultiScores:
    """Answer for several rewards: results by reward, and totals where ``combine`` was asked for; all in item order."""

    results: dict[str, list[ItemScore | ScoreFailure]]
    totals: list[float | ScoreFailure] | None = None
    revisions: dict[str, str] = field(default_factory=dict)


def parts(options: ScoreOptions, prompts: Sequence[str], media: Sequence[Media], settings: Settings) -> list[Part]:
    """The requests of a batch, in order."""
    out: list[Part] = []
    start, size = 0, 0
    for i, item in enumerate(media):
        if i > start and (i - start >= settings.chunk_items or size + item.frames.nbytes > settings.chunk_bytes):
            out.append(_part(options, prompts[start:i], media[start:i], settings))
            start, size = i, 0
        size += item.frames.nbytes
    if start < len(media):
        out.append(_part(options, prompts[start:], media[start:], settings))
    return out


def _part(options: ScoreOptions, prompts: Sequence[str], media: Sequence[Media], settings: Settings) -> Part:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    files = _files(media, settings.encoding)
    if files is not None:
        return Part(len(media), {"headers": headers, "data": _fields(options, prompts, media[0]), "files": files})
    headers["Content-Type"] = "application/vnd.safetensors"
    return Part(len(media), {"headers": headers, "content": _tensors(options, prompts, media)})


def _files(media: Sequence[Media], encoding: Encoding) -> list[Upload] | None:
    """The media as files of a form; None when they must go as tensors."""
    if encoding == "png" and not any(item.is_video for item in media):
        return [("file", (f"{i}.png", _png(item), "image/png")) for i, item in enumerate(media)]
    if encoding == "safetensors" or any((item.fps, item.selected) != (media[0].fps, media[0].selected) for item in media):
        return None
    pixels = _pixels(media)
    arrays = [np.stack(pixels)] if all(p.shape == pixels[0].shape for p in pixels) else pixels
    return [("file", (f"{i}.npy", _npy(array), "application/octet-stream")) for i, array in enumerate(arrays)]


def _pixels(media: Sequence[Media]) -> list[NDArray[np.uint8]]:
    """Images as [H, W, 3], clips as [T, H, W, 3]."""
    return [item.frames if item.is_video else item.pixels for item in media]


def _fields(options: ScoreOptions, prompts: Sequence[str], first: Media) -> dict[str, Any]:
    data: dict[str, Any] = {"prompt": list(prompts), "model": options.model, "reward": options.rewards, "fps": first.fps}
    data["combine"] = None if options.combine is None else options.combine.model_dump_json()
    data["selected"] = "true" if first.is_video and first.selected else None
    return {name: value for name, value in data.items() if value is not None}


def _npy(array: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return buffer.getvalue()


def _png(item: Media) -> bytes:
    from PIL import Image as PILImage

    buffer = io.BytesIO()
    PILImage.fromarray(item.pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _tensors(options: ScoreOptions, prompts: Sequence[str], media: Sequence[Media]) -> bytes:
    from safetensors.numpy import save

    items = [TensorItem(prompt=p, fps=m.fps, selected=m.selected and m.is_video) for p, m in zip(prompts, media, strict=True)]
    request = TensorRequest(**_given(options), items=items)
    pixels = _pixels(media)
    one = all(p.shape == pixels[0].shape for p in pixels)
    tensors = {"media": np.stack(pixels)} if one else {f"media.{i}": p for i, p in enumerate(pixels)}
    # `save` writes an array's memory as it lies, whatever its strides: only C order arrives as it was.
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return save(tensors, {"request": request.model_dump_json(exclude_none=True)})


def _given(options: ScoreOptions) -> dict[str, Any]:
    return {name: value for name in ("model", "rewards", "combine", "timeout_s") if (value := getattr(options, name)) is not None}


def options_for(rewards: Sequence[str], combine: Combine | None) -> ScoreOptions:
    """Several rewards. Raises ``ValueError`` for what the service would refuse unseen."""
    return ScoreOptions(rewards=list(rewards), combine=combine)


class Exchange:
    """One request's attempts under a deadline shared with the other requests of its call."""

    def __init__(self, where: str, backoff: Backoff, timeout_s: float, keys: Keys, connect_s: float | None) -> None:
        self._where, self._backoff, self._timeout_s, self._keys, self._connect_s = where, backoff, timeout_s, keys, connect_s
        self._started = time.monotonic()
        self._heard: tuple[str, int] | None = None  # the last refusal: what it said, its status

    def limits(self) -> httpx.Timeout:
        """Httpx' limits of the next attempt."""
        left = max(0.001, self._backoff.remaining())
        return httpx.Timeout(left, connect=min(left, self._connect_s or left))

    def deadline_header(self) -> dict[str, str]:
        """Tells the server when the answer is of no use any more."""
        return {"X-Timeout-S": f"{min(3600.0, max(0.001, self._backoff.remaining())):.3f}"}

    def unreachable(self, error: httpx.TransportError) -> float:
        """Seconds to wait before the next attempt. Raises ``RewardUnavailable`` when there is none."""
        what = f"cannot be reached ({type(error).__name__}: {error})"
        waited = time.monotonic() - self._started
        if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout) and self._connect_s is not None and waited >= self._connect_s:
            raise unavailable(self._where, f"{what}, given up after {waited:.0f} s", None, self._keys)
        if self._heard is None:
            return self._wait(what, None, 0.0)
        refusal, status = self._heard  # the deadline often cuts the last attempt short: what the service said before is the trouble
        return self._wait(f"{refusal}, then {'no answer in time' if isinstance(error, httpx.TimeoutException) else what}", status, 0.0)

    def answered(self, answer: httpx.Response) -> float | None:
        """None when ``answer`` is it, else seconds to wait. Raises ``RewardUnavailable`` for a refusal for good."""
        if answer.status_code == 200:
            return None
        # 409 is our own first attempt with this idempotency key, still being worked on.
        if answer.status_code not in (408, 409, 429) and answer.status_code < 500:
            raise unavailable(self._where, _refusal(answer), answer.status_code, self._keys)
        self._heard = _refusal(answer), answer.status_code
        return self._wait(*self._heard, retry_after_seconds(answer.headers.get("retry-after")))

    def _wait(self, what: str, status: int | None, at_least_s: float) -> float:
        wait = self._backoff.next_wait(at_least_s)
        if wait is None:
            raise unavailable(self._where, f"{what}, {self._backoff.attempts} attempts in {self._timeout_s:g} s", status, self._keys)
        return wait


def read_scores(where: str, answer: httpx.Response, count: int, keys: Keys) -> list[ItemScore | ScoreFailure]:
    """Results of a request for one model. Raises ``RewardUnavailable`` for another form or count."""
    return _results(where, _parsed(where, answer, ScoreResponse, keys).results, count, answer, keys)


def read_multi(where: str, answer: httpx.Response, count: int, keys: Keys) -> MultiScores:
    """Results of a request for several rewards."""
    found = _parsed(where, answer, MultiScoreResponse, keys)
    results = {name: _results(where, reward.results, count, answer, keys) for name, reward in found.rewards.items()}
    totals: list[float | ScoreFailure] | None = None
    if found.combined is not None:
        if len(found.combined) != count:
            raise unavailable(where, f"{len(found.combined)} totals for {count} items", answer.status_code, keys)
        totals = [c.total if c.total is not None else _failure(c) for c in found.combined]
    return MultiScores(results, totals, {name: reward.revision for name, reward in found.rewards.items()})


def file_part(rewards: Sequence[str], prompts: Sequence[str], files: Sequence[tuple[str, bytes]]) -> Part:
    """One request with files as they are: (name, bytes) of PNG, JPEG, WebP, npy or mp4."""
    form: dict[str, Any] = {"prompt": list(prompts), "reward": list(rewards)}
    uploads = [("file", (name, data, "application/octet-stream")) for name, data in files]
    return Part(len(files), {"headers": {"Idempotency-Key": uuid.uuid4().hex}, "data": form, "files": uploads})


def read_answer(where: str, answer: httpx.Response, keys: Keys) -> MultiScoreResponse:
    """The whole answer to a request for several rewards. Raises ``RewardUnavailable`` for another form."""
    return _parsed(where, answer, MultiScoreResponse, keys)


def joined(answers: Sequence[MultiScores]) -> MultiScores:
    """The answers of a batch's requests as one."""
    results = {name: [r for a in answers for r in a.results[name]] for name in answers[0].results}
    totals = None if answers[0].totals is None else [t for a in answers for t in a.totals or ()]
    return MultiScores(results, totals, answers[0].revisions)


def read_models(where: str, answer: httpx.Response, keys: Keys) -> dict[str, ModelInfo]:
    """Answer of ``GET /v1/models`` by name."""
    return {info.name: info for info in _parsed(where, answer, ModelList, keys).models}


def named(where: str, models: dict[str, ModelInfo], name: str) -> ModelInfo:
    """The model ``name``. Raises ``RewardUnavailable`` naming what there is."""
    if name not in models:
        raise RewardUnavailable(where, f"it has no model {name!r}", f"It has: {', '.join(models) or 'none'}.", 200)
    return models[name]


def _results(where: str, scores: Sequence[Score], count: int, answer: httpx.Response, keys: Keys) -> list[ItemScore | ScoreFailure]:
    if len(scores) != count:
        raise unavailable(where, f"{len(scores)} results for {count} items", answer.status_code, keys)
    return [ItemScore(s.reward, dict(s.scores), s.text) if s.reward is not None and s.scores is not None else _failure(s) for s in scores]


def _failure(item: Any) -> ScoreFailure:
    return ScoreFailure(item.error.code, item.error.message, item.error.retryable)


def _parsed(where: str, answer: httpx.Response, schema: type[Schema], keys: Keys) -> Schema:
    try:
        # A newer service may say more.
        return schema.model_validate_json(answer.content, extra="ignore")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        raise unavailable(where, f"its answer is not the reward contract: {first['msg']}", answer.status_code, keys) from error


def _refusal(answer: httpx.Response) -> str:
    """One line about a status that is not 200."""
    try:
        problem = Problem.model_validate_json(answer.content, extra="ignore")
    except ValidationError:
        return f"answered HTTP {answer.status_code}"
    return f"answered HTTP {answer.status_code} ({problem.code}: {problem.detail})"


def unavailable(where: str, what: str, status: int | None, keys: Keys) -> RewardUnavailable:
    """The error with the advice that fits its status."""
    if status is None:
        advice = f"Check that the service runs and that {keys.url} names its host and port."
    elif status in (401, 403):
        advice = f"The service wants a valid key: see {keys.api_key}."
    elif status == 404:
        advice = f"Check {keys.url} (base URL, without /v1) and the names of the rewards."
    elif status in (408, 409, 429, 503, 504):
        advice = f"The service is overloaded: add replicas there, or raise {keys.timeout}."
    elif status >= 500:
        advice = "Look into the service's log."
    else:
        advice = f"Check that {keys.url} points at a reward service of this version."
    return RewardUnavailable(where, what, advice, status)
