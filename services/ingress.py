"""The REST face of the fleet: a thin FastAPI app that checks, decodes off the event loop, and asks the
scorers.

Lifecycle of ``POST /v1/score``: body (bounded while it streams in) → prompts and images (bounded before
pixels are allocated, decoded in a thread) → one call to the scorer deployment, repeated if its replica dies,
within the request's deadline → per item scores or a typed error. The app knows its scorers only through
``ScoreBackend``.
"""

from __future__ import annotations

import base64
import binascii
from typing import Any, cast

from anyio import to_thread
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services import problems
from services.backend import ScoreBackend
from services.client.base import Image, ItemScore, Media, ScoreFailure
from services.limits import LimitsConfig
from services.media import decode_files
from services.problems import ProblemError
from services.schemas import (
    Health,
    ModelList,
    Problem,
    Score,
    ScoreError,
    ScoreRequest,
    ScoreResponse,
)

_SCORE_DOC: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["prompt", "file"],
                    "properties": {
                        "model": {"type": "string", "default": "ocr"},
                        "prompt": {
                            "type": "array",
                            "items": {"type": "string"},
                            "description": "One per image, in order; repeat the field.",
                        },
                        "file": {
                            "type": "array",
                            "items": {"type": "string", "format": "binary"},
                            "description": "PNG, JPEG, WebP, or npy (uint8 [H, W, 3] or [B, H, W, 3] RGB).",
                        },
                    },
                }
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/ScoreRequest"}},
        },
    }
}


class BodyLimit:
    """ASGI middleware: refuse a body by its Content-Length, or as soon as more than the limit has arrived."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count request bytes on their way to the app."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        too_large = ProblemError(413, "body_too_large", f"the body exceeds {self._limit} bytes")
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > self._limit:
            await problems.problem_response(too_large)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                raise too_large
            return message

        await self._app(scope, counted, send)


def make_app(backend: ScoreBackend, limits: LimitsConfig) -> FastAPI:
    """The REST app over ``backend``."""
    app = FastAPI(
        title="ddrl reward fleet",
        version="1",
        description="Scores generated images. A failure is a typed error per item, never a number.",
        responses={code: {"model": Problem} for code in (404, 413, 415, 422, 503, 504)},
    )
    problems.install(app)
    app.add_middleware(BodyLimit, limit=limits.max_body_bytes)

    @app.get("/healthz")
    async def healthz() -> Health:
        """Whether the ingress is alive."""
        return Health()

    @app.get("/v1/models")
    async def models() -> ModelList:
        """The reward models of this fleet."""
        return ModelList(models=await backend.models())

    @app.post("/v1/score", response_model_exclude_none=True, openapi_extra=_SCORE_DOC)
    async def score(request: Request) -> ScoreResponse:
        """Score images against their prompts."""
        model, prompts, files = await _read_request(request, limits)
        known = {info.name: info for info in await backend.models()}
        if model not in known:
            raise ProblemError(404, "model_not_found", f"no model {model[:64]!r}; there is {', '.join(known)}")
        images = await to_thread.run_sync(decode_files, files, limits)
        _check_prompts(prompts, images, limits)
        results = await _score_readable(backend, model, prompts, images)
        info = known[model]
        return ScoreResponse(model=model, revision=info.revision, preprocessing_hash=info.preprocessing_hash, results=[as_wire(r) for r in results])

    # The handler reads the raw request, so the JSON form is put into the OpenAPI document by hand.
    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = FastAPI.openapi(app)
            schema = ScoreRequest.model_json_schema(ref_template="#/components/schemas/{model}")
            schemas = document["components"]["schemas"]
            schemas.update(schema.pop("$defs"))
            schemas["ScoreRequest"] = schema
        return cast(dict[str, Any], app.openapi_schema)

    app.openapi = openapi  # type: ignore[method-assign]
    return app


async def _score_readable(backend: ScoreBackend, model: str, prompts: list[str], images: list[Image | ScoreFailure]) -> list[ItemScore | ScoreFailure]:
    """Score what could be decoded; keep the failures in their places."""
    readable = [(i, image) for i, image in enumerate(images) if not isinstance(image, ScoreFailure)]
    scored: list[ItemScore | ScoreFailure] = []
    if readable:
        scored = await backend.score(model, [prompts[i] for i, _ in readable], [Media.image(image) for _, image in readable], 60.0)
    by_index = dict(zip((i for i, _ in readable), scored, strict=True))
    return [image if isinstance(image, ScoreFailure) else by_index[i] for i, image in enumerate(images)]


def as_wire(result: ItemScore | ScoreFailure) -> Score:
    """A scorer's result in the form of the REST contract."""
    if isinstance(result, ScoreFailure):
        return Score(error=ScoreError(code=result.code, message=result.message, retryable=result.retryable))
    return Score(reward=result.reward, scores=result.sub_scores, text=result.text)


def _check_prompts(prompts: list[str], images: list[Image | ScoreFailure], limits: LimitsConfig) -> None:
    if len(prompts) != len(images):
        why = next((f"; one file failed: {i.message}" for i in images if isinstance(i, ScoreFailure)), "")
        raise ProblemError(422, "invalid_request", f"{len(prompts)} prompts for {len(images)} images{why}")
    longest = max(map(len, prompts))
    if longest > limits.max_prompt_chars:
        raise ProblemError(413, "prompt_too_long", f"a prompt has {longest} characters, at most {limits.max_prompt_chars}")


async def _read_request(request: Request, limits: LimitsConfig) -> tuple[str, list[str], list[bytes]]:
    """Model, prompts and files of a request in either form."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        return await _read_json(await request.body(), limits)
    if kind != "multipart/form-data":
        raise ProblemError(
            415,
            "unsupported_media_type",
            "send multipart/form-data (prompt, file) or application/json (items)",
        )
    async with request.form(max_files=limits.max_items, max_fields=limits.max_items + 1, max_part_size=4 * limits.max_prompt_chars) as form:
        prompts = [value for value in form.getlist("prompt") if isinstance(value, str)]
        files = [await value.read() for value in form.getlist("file") if isinstance(value, UploadFile)]
        model = form.get("model", "ocr")
    if not prompts or not files or not isinstance(model, str):
        raise ProblemError(422, "invalid_request", "give at least one 'prompt' field and one 'file'")
    return model, prompts, files


async def _read_json(body: bytes, limits: LimitsConfig) -> tuple[str, list[str], list[bytes]]:
    def parse() -> tuple[str, list[str], list[bytes]]:
        try:
            request = ScoreRequest.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"])) or "body"
            raise ProblemError(422, "invalid_request", f"{where}: {first['msg']}") from None
        if len(request.items) > limits.max_items:
            detail = f"{len(request.items)} images, at most {limits.max_items} per request"
            raise ProblemError(413, "too_many_items", detail)
        try:
            files = [base64.b64decode(item.image, validate=True) for item in request.items]
        except (binascii.Error, ValueError):
            raise ProblemError(422, "invalid_request", "an image is not valid base64") from None
        return request.model, [item.prompt for item in request.items], files

    return await to_thread.run_sync(parse)
