"""Errors of the REST ingress as RFC 9457 problem details with stable codes.

Invariant: what leaves the process names a code, a status, one line about the request and the request's id; no
traceback, no path, no internal type.
"""

from __future__ import annotations

import logging
import math
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from services.errors import ProblemError
from services.rest.schemas import Problem

logger = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
_TITLES = {413: "Content Too Large", 422: "Unprocessable Content", 499: "Client Closed Request"}
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
_FRAMEWORK_CODES = {400: "invalid_request", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}


def invalid_request(error: ValidationError | RequestValidationError, where: str = "") -> ProblemError:
    """422 that names the first thing a schema found; the offending value is not repeated."""
    errors: Any = error.errors(include_url=False, include_input=False, include_context=False) if isinstance(error, ValidationError) else error.errors()
    first = errors[0]
    path = ".".join(str(part)[:64] for part in (where, *first["loc"]) if part != "") or "body"
    return ProblemError(422, "invalid_request", f"{path}: {first['msg']}"[:500])


def as_problem(error: ProblemError, request_id: str = "") -> Problem:
    """The document for ``error``."""
    title = _TITLES.get(error.status) or HTTPStatus(error.status).phrase
    return Problem(title=title, status=error.status, code=error.code, detail=error.detail, request_id=request_id)


def problem_response(error: ProblemError, request_id: str = "") -> Response:
    """The document for ``error``, with ``Retry-After`` when waiting helps."""
    body = as_problem(error, request_id)
    headers: dict[str, str] = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.challenge is not None:
        headers["WWW-Authenticate"] = error.challenge
    return JSONResponse(body.model_dump(), error.status, headers=headers, media_type=MEDIA_TYPE)


def request_id_of(request: Request) -> str:
    """The id that the guard gave this request; empty where no guard stands in front."""
    return str(getattr(request.state, "request_id", ""))


async def _on_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem_response(error, request_id_of(request))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Routing errors and malformed bodies, which the framework raises by itself."""
    assert isinstance(error, HTTPException)
    code = _FRAMEWORK_CODES.get(error.status_code, "http_error")
    response = problem_response(ProblemError(error.status_code, code, str(error.detail)), request_id_of(request))
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(_allowed(request))
    return response


def _allowed(request: Request) -> list[str]:
    """Every method of the path; the framework names those of the first route that has it."""
    scope = {**request.scope, "path_params": {}}
    return [m for m in _METHODS if any(route.matches({**scope, "method": m})[0] is Match.FULL for route in request.app.router.routes)]


async def _on_validation(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return problem_response(invalid_request(error), request_id_of(request))


async def _on_bug(request: Request, error: Exception) -> Response:
    logger.error("unhandled error in the reward ingress, request %s", request_id_of(request), exc_info=error)
    return problem_response(ProblemError(500, "internal_error", "the service failed on this request"), request_id_of(request))


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem document."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(Exception, _on_bug)


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """``responses=`` of a route: problem documents with these statuses."""
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}
    headers = {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}}
    return {
        status: {"description": _TITLES.get(status) or HTTPStatus(status).phrase, "content": content, **({"headers": headers} if status in (429, 503) else {})}
        for status in statuses
    }
