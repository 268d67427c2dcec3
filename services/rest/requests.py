"""The body of a scoring request in any of its three forms → one ``ScoreCall``. No scorer, no event loop.

| content type | form |
|---|---|
| application/json | ``ScoreRequest``; media as base64 |
| multipart/form-data | fields of ``ScoreRequest`` (``prompt``, ``file``, ``reward`` repeated; ``combine`` as JSON) |
| application/vnd.safetensors, application/octet-stream | tensors; the rest as JSON in the metadata string ``request`` |

Everything is bounded here: nesting, items, rewards, prompts, and through the plans all sizes that headers promise.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ValidationError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.arrays import plan_pixels
from services.media.decode import plan
from services.media.json_bounds import JsonTooLarge, check_json
from services.media.plan import Plan, Refused, Upload, broken
from services.media.tensors import Tensor, parse
from services.rest.problems import invalid_request
from services.rest.schemas import Combine, Fps, ScoreOptions, ScoreRequest, TensorRequest

JSON, MULTIPART = "application/json", "multipart/form-data"
TENSORS = ("application/vnd.safetensors", "application/octet-stream")
_FIELDS = ("model", "reward", "combine", "timeout_s", "prompt", "fps", "selected", "file")
_HEADER_BYTES = 4 << 20

Schema = TypeVar("Schema", bound=BaseModel)


@dataclass(frozen=True)
class Latent:
    """One item that a decoder must turn into pixels: float32 [C, H, W] or [C, T, H, W]."""

    values: NDArray[np.float32]
    fps: float | None
    selected: bool = False


@dataclass(frozen=True)
class ScoreCall:
    """A parsed request: as many prompts as items in ``plans``, or in ``latents``."""

    options: ScoreOptions
    prompts: list[str]
    plans: list[Plan]
    latents: list[Latent] = field(default_factory=list)
    fingerprint: str = ""


def parse_call(content_type: str, body: bytes, limits: LimitsConfig) -> ScoreCall:
    """Parse ``body``; blocking, so call it in a thread. Raises ``ProblemError`` 400, 413, 415 or 422."""
    kind = content_type.partition(";")[0].strip().lower()
    if kind == JSON:
        return _json(body, limits)
    if kind == MULTIPART:
        return asyncio.run(_multipart(content_type, body, limits))
    if kind in TENSORS:
        return _tensors(body, limits)
    raise ProblemError(415, "unsupported_media_type", f"send {JSON}, {MULTIPART} or {TENSORS[0]}")


def parse_json(text: bytes, schema: type[Schema], limits: LimitsConfig, where: str = "") -> Schema:
    """``text`` as ``schema``, within the limits of depth and size. Raises ``ProblemError`` 413 or 422."""
    try:
        check_json(text, limits.max_json_depth)
    except JsonTooLarge as error:
        raise ProblemError(413, "json_too_large", str(error)) from None
    try:
        return schema.model_validate_json(text)
    except ValidationError as error:
        raise invalid_request(error, where) from None


def _json(body: bytes, limits: LimitsConfig) -> ScoreCall:
    request = parse_json(body, ScoreRequest, limits)
    _check(request, [item.prompt for item in request.items], len(request.items), limits)
    uploads: list[Upload] = []
    for i, item in enumerate(request.items):
        try:
            data = base64.b64decode(item.image or item.video or "", validate=True)
        except ValueError:
            raise ProblemError(422, "invalid_request", f"items.{i}: the media is not valid base64") from None
        uploads.append(Upload(data, "image" if item.image is not None else "video", item.fps, item.selected))
    plans = [_single(plan(upload)) for upload in uploads]
    return _call(request, [item.prompt for item in request.items], plans, [u.data for u in uploads], repr([(u.kind, u.fps, u.selected) for u in uploads]))


def _single(found: Plan) -> Plan:
    """One item of JSON is one image or clip; a file with more is that item's failure."""
    return found if found.items == 1 else broken("an item is one image or one clip; this file holds a batch")


class _Parser(MultiPartParser):
    """The body is in memory already and bounded; parts need no temporary files."""

    spool_max_size = 1 << 62


async def _multipart(content_type: str, body: bytes, limits: LimitsConfig) -> ScoreCall:
    async def stream() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(body), 1 << 20):
            yield body[start : start + (1 << 20)]
        yield b""

    headers = Headers({"content-type": content_type})
    parser = _Parser(
        headers,
        stream(),
        max_files=limits.max_items,
        max_fields=limits.max_items + limits.max_rewards + 8,
        max_part_size=max(1 << 16, 4 * limits.max_prompt_chars),
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        many = error.message.startswith("Too many")
        raise ProblemError(413 if many else 400, "too_many_items" if many else "invalid_request", f"multipart: {error.message[:200]}") from None
    except (KeyError, ValueError, LookupError):
        raise ProblemError(400, "invalid_request", "the multipart body or its boundary is malformed") from None
    return _form(form, limits)


def _form(form: FormData, limits: LimitsConfig) -> ScoreCall:
    unknown = sorted(name for name in form if name not in _FIELDS)
    if unknown:
        raise ProblemError(422, "invalid_request", f"unknown field {unknown[0][:64]!r}; there are {', '.join(_FIELDS)}")
    texts: dict[str, list[str]] = {}
    files: list[bytes] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) != (name == "file"):
            raise ProblemError(422, "invalid_request", f"{name} must be a {'file' if name == 'file' else 'text field'}")
        if isinstance(value, UploadFile):
            files.append(value.file.read())
        else:
            texts.setdefault(name, []).append(value)
    for name in ("model", "combine", "timeout_s", "fps", "selected"):
        if len(texts.get(name, [])) > 1:
            raise ProblemError(422, "invalid_request", f"{name} is there twice")
    combine = parse_json(texts["combine"][0].encode("utf-8", "replace"), Combine, limits, "combine") if "combine" in texts else None
    plain = {name: texts[name][0] for name in ("model", "timeout_s", "fps", "selected") if name in texts}
    try:
        options = _FormOptions.model_validate({**plain, "rewards": texts.get("reward"), "combine": combine})
    except ValidationError as error:
        raise invalid_request(error) from None
    fps, selected = options.fps, options.selected
    prompts = texts.get("prompt", [])
    if not files:
        raise ProblemError(422, "invalid_request", "give at least one 'file'")
    _check(options, prompts, len(files), limits)
    plans = [plan(Upload(data, None, fps, selected)) for data in files]
    items = sum(p.items for p in plans)
    if not prompts:
        prompts = [""] * min(items, limits.max_items)
    return _call(options, prompts, plans, files, repr((fps, selected)))


def _tensors(body: bytes, limits: LimitsConfig) -> ScoreCall:
    try:
        metadata, tensors = parse(body, _HEADER_BYTES, limits.max_items)
    except Refused as refusal:
        raise ProblemError(422, "invalid_request", str(refusal)) from None
    request = parse_json(metadata.get("request", "{}").encode("utf-8", "replace"), TensorRequest, limits, "request")
    _check(request, [item.prompt for item in request.items], len(request.items), limits)
    rows = _rows(tensors, len(request.items))
    plans: list[Plan] = []
    latents: list[Latent] = []
    if sum(row.size for row in rows if row.dtype != np.uint8) > limits.max_latent_values:
        raise ProblemError(413, "latents_too_large", f"the latents have too many values, at most {limits.max_latent_values} per request")
    for i, (row, item) in enumerate(zip(rows, request.items, strict=True)):
        if row.dtype != np.uint8:
            if row.ndim not in (3, 4) or 0 in row.shape:
                raise ProblemError(422, "invalid_request", f"item {i}: latents must be [C, H, W] or [C, T, H, W], got {list(row.shape)}")
            latents.append(Latent(row, item.fps, item.selected))
            continue
        try:
            plans.append(_single(plan_pixels(row, item.fps, item.selected)))
        except Refused as refusal:
            raise ProblemError(422, "invalid_request", f"item {i}: {refusal}") from None
    if plans and latents:
        raise ProblemError(422, "invalid_request", "pixels and latents do not mix in one request")
    extra = repr([(item.fps, item.selected) for item in request.items])
    shapes = repr([(name, t.dtype, t.shape) for name, t in sorted(tensors.items())])
    return _call(request, [item.prompt for item in request.items], plans, [t.data for _, t in sorted(tensors.items())], extra + shapes, latents)


def _rows(tensors: dict[str, Tensor], count: int) -> list[NDArray[Any]]:
    """The array of every item, from one batch or from one tensor per item."""
    for name in ("media", "latents"):
        if (tensors.keys() == {name}) and (tensors[name].dtype == "U8") == (name == "media"):
            batch = tensors[name].array()
            if batch.ndim < 4 or len(batch) != count:
                raise ProblemError(422, "invalid_request", f"tensor {name} {list(batch.shape)} does not hold {count} items")
            return list(batch)
        names = [f"{name}.{i}" for i in range(count)]
        if tensors.keys() == set(names) and all((tensors[n].dtype == "U8") == (name == "media") for n in names):
            return [tensors[n].array() for n in names]
    raise ProblemError(422, "invalid_request", f"for {count} items send one tensor 'media' (U8) or 'latents' (F16, BF16, F32), or one 'media.i' each")


def _check(options: ScoreOptions, prompts: Sequence[str], items: int, limits: LimitsConfig) -> None:
    if max(items, len(prompts)) > limits.max_items:
        raise ProblemError(413, "too_many_items", f"{max(items, len(prompts))} items, at most {limits.max_items} per request")
    if len(options.rewards or ()) > limits.max_rewards:
        raise ProblemError(413, "too_many_rewards", f"{len(options.rewards or ())} rewards, at most {limits.max_rewards} per request")
    longest = max(map(len, prompts), default=0)
    if longest > limits.max_prompt_chars:
        raise ProblemError(413, "prompt_too_long", f"a prompt has {longest} characters, at most {limits.max_prompt_chars}")


def _call(
    options: ScoreOptions, prompts: list[str], plans: list[Plan], blobs: Sequence[bytes | memoryview], extra: str, latents: Sequence[Latent] = ()
) -> ScoreCall:
    """A limit that is exceeded comes before a count that does not fit, so that the caller hears the cause."""
    plain = ScoreOptions(model=options.model, rewards=options.rewards, combine=options.combine, timeout_s=options.timeout_s)
    digest = hashlib.sha256(plain.model_dump_json(exclude={"timeout_s"}).encode())
    digest.update(repr((prompts, extra, [len(blob) for blob in blobs])).encode("utf-8", "surrogatepass"))
    for blob in blobs:
        digest.update(blob)
    return ScoreCall(plain, prompts, plans, list(latents), digest.hexdigest())


class _FormOptions(ScoreOptions):
    """The text fields of a form that are not prompts."""

    fps: Fps | None = None
    selected: bool = False
