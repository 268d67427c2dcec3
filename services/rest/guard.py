"""What stands in front of the app: header checks, keys, body and memory limits, request ids, the last resort.

Order for every request: id → headers → who may → how much → the app. A refusal costs no body: nothing is read before
all of it has passed. Invariant: every answer carries ``X-Request-ID``, and an error that nobody caught is a problem
document without internals.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.errors import ProblemError
from services.limits import LimitsConfig
from services.rest import docs
from services.rest.auth import Key, Keyring, is_loopback
from services.rest.metrics import FleetMetrics
from services.rest.problems import problem_response

logger = logging.getLogger(__name__)

OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", "/openapi.json", *docs.PATHS})
ADMIN_PATHS = frozenset({"/metrics"})
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
_CHALLENGE = 'Bearer realm="ddrl rewards"'


class Access:
    """Who may do what. With keys: everything needs one, except the open paths. Without: this machine only.

    Without keys a page in somebody's browser could still reach a service on loopback, so ``Host`` and ``Origin`` must
    name this machine or one of ``hosts``.
    """

    def __init__(self, keyring: Keyring | None, open_paths: Collection[str] = (), hosts: Collection[str] = ()) -> None:
        self._keyring = keyring
        self._open = OPEN_PATHS | set(open_paths)
        self._hosts = frozenset(host.lower() for host in hosts)

    def admit(self, path: str, headers: Headers) -> Key | None:
        """The key that lets the request in, None where none is needed. Raises ``ProblemError`` 401 or 403."""
        if self._keyring is None:
            self._local(headers)
            return None
        if path in self._open:
            return None
        kind, _, secret = headers.get("authorization", "").partition(" ")
        if kind.lower() != "bearer" or not secret.strip():
            raise ProblemError(401, "key_missing", "send a key as 'Authorization: Bearer …'", challenge=_CHALLENGE)
        key = self._keyring.find(secret.strip())
        if key is None:
            raise ProblemError(401, "key_unknown", "this key is not known here", challenge=f'{_CHALLENGE}, error="invalid_token"')
        need = "admin" if path in ADMIN_PATHS else "score"
        if need not in key.scopes:
            challenge = f'{_CHALLENGE}, error="insufficient_scope", scope="{need}"'
            raise ProblemError(403, "scope_missing", f"this key has no scope '{need}'", challenge=challenge)
        return key

    def _local(self, headers: Headers) -> None:
        host, origin = headers.get("host", ""), headers.get("origin")
        try:
            names = [urlsplit(f"//{host}").hostname or "" if host else "localhost"]
            names += [] if origin is None else [urlsplit(origin).hostname or ""]
        except ValueError:
            names = [""]
        if not all(is_loopback(name) or name in self._hosts for name in names):
            raise ProblemError(403, "host_not_allowed", "without keys this service answers to this machine only, called by a loopback name")


def check_headers(headers: Headers, limits: LimitsConfig) -> int:
    """Bytes the request may bring. Raises ``ProblemError`` for headers that are too large, doubled or contradictory."""
    size = sum(len(name) + len(value) + 4 for name, value in headers.raw)
    if size > limits.max_header_bytes:
        raise ProblemError(431, "headers_too_large", f"the headers have {size} bytes, at most {limits.max_header_bytes}")
    for name in ("content-length", "transfer-encoding", "content-type", "authorization", "host", "idempotency-key"):
        if len(headers.getlist(name)) > 1:
            raise ProblemError(400, "invalid_request", f"the header {name} is there twice")
    length, transfer = headers.get("content-length"), headers.get("transfer-encoding")
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ProblemError(415, "unsupported_media_type", "compressed bodies are not accepted")
    if transfer is not None:
        if length is not None or transfer.strip().lower() != "chunked":
            raise ProblemError(400, "invalid_request", "transfer-encoding must be 'chunked', without content-length")
        return limits.max_body_bytes
    if length is None:
        return 0
    if not re.fullmatch(r"[0-9]{1,18}", length):
        raise ProblemError(400, "invalid_request", "content-length must be a number")
    if int(length) > limits.max_body_bytes:
        raise _too_large(limits)
    return int(length)


class Guard:
    """The outermost ASGI layer of the ingress. ``behind_serve``: Serve's proxy puts the request's id into the answer by itself."""

    def __init__(self, app: ASGIApp, access: Access, limits: LimitsConfig, metrics: FleetMetrics, behind_serve: bool = False) -> None:
        self._app, self._access, self._limits, self._metrics, self._behind_serve = app, access, limits, metrics, behind_serve
        self._inflight = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it here."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
            else:
                await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id
        status, started = 0, time.monotonic()

        async def reply(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                out = MutableHeaders(scope=message)
                if not self._behind_serve:
                    out["X-Request-ID"] = request_id
                out["X-Content-Type-Options"] = "nosniff"
                out.setdefault("Cache-Control", "no-store")
            await send(message)

        try:
            await self._admitted(scope, headers, receive, reply)
        except ProblemError as refusal:
            await problem_response(refusal, request_id)(scope, receive, reply)
        except Exception:
            logger.exception("unhandled error in the reward ingress, request %s", request_id)
            if status:
                raise
            error = ProblemError(500, "internal_error", "the service failed on this request")
            await problem_response(error, request_id)(scope, receive, reply)
        finally:
            self._metrics.request(scope, status, time.monotonic() - started)

    async def _admitted(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        size = check_headers(headers, self._limits)
        scope["state"]["key"] = self._access.admit(route_path(scope), headers)
        if self._inflight + size > self._limits.max_inflight_bytes:
            raise ProblemError(503, "overloaded", "too many bytes are being worked on; try again", retry_after_s=1)
        self._inflight += size
        try:
            await self._app(scope, _counted(receive, size, self._limits), send)
        finally:
            self._inflight -= size


def route_path(scope: Scope) -> str:
    """The path inside the app: without the route prefix under which Serve runs it."""
    path, prefix = str(scope["path"]), str(scope.get("root_path", ""))
    return path.removeprefix(prefix) if path.startswith(f"{prefix}/") else path


def _counted(receive: Receive, announced: int, limits: LimitsConfig) -> Receive:
    """``receive`` that ends the request when more arrives than was announced."""
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > announced:
            raise _too_large(limits)
        return message

    return counted


def _too_large(limits: LimitsConfig) -> ProblemError:
    return ProblemError(413, "body_too_large", f"the body exceeds {limits.max_body_bytes} bytes")


def _request_id(headers: Headers) -> str:
    """The caller's id if it is well formed, else a new one."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
