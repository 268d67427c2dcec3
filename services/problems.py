"""Errors of the REST ingress as RFC 9457 problem details with stable codes.

Invariant: what leaves the process names a code, a status and one line about the request; no traceback, no
path, no internal type.
"""

from __future__ import annotations

import logging
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from services.schemas import Problem

logger = logging.getLogger(__name__)


class ProblemError(Exception):
    """Ends a request with a problem document."""

    def __init__(self, status: int, code: str, detail: str, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail, self.retry_after_s = status, code, detail, retry_after_s


def problem_response(error: ProblemError) -> Response:
    """The document for ``error``, with ``Retry-After`` when waiting helps."""
    body = Problem(title=HTTPStatus(error.status).phrase, status=error.status, code=error.code, detail=error.detail)
    headers = {} if error.retry_after_s is None else {"Retry-After": f"{max(1, round(error.retry_after_s))}"}
    return JSONResponse(body.model_dump(), error.status, headers=headers, media_type="application/problem+json")


async def _on_problem(_: Request, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem_response(error)


async def _on_http_exception(_: Request, error: Exception) -> Response:
    """Routing errors and malformed multipart bodies, which the framework raises by itself."""
    assert isinstance(error, HTTPException)
    codes = {404: "not_found", 405: "method_not_allowed", 400: "invalid_request"}
    code = codes.get(error.status_code, "http_error")
    return problem_response(ProblemError(error.status_code, code, str(error.detail)))


async def _on_bug(_: Request, error: Exception) -> Response:
    logger.error("unhandled error in the reward ingress", exc_info=error)
    return problem_response(ProblemError(500, "internal_error", "the service failed on this request"))


def install(app: FastAPI) -> None:
    """Answer every error of ``app`` with a problem document."""
    app.add_exception_handler(ProblemError, _on_problem)
    app.add_exception_handler(HTTPException, _on_http_exception)
    app.add_exception_handler(Exception, _on_bug)
