"""The door of the service: keys and scopes, loopback names, headers and framing over a raw socket, ids, memory."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import pickle
import socket
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import uvicorn

from services.client.base import RewardUnavailable
from services.client.rest import RestRewardClient
from services.limits import LimitsConfig
from services.media.base import Image
from services.rest.auth import parse_keys
from services.rest.ingress import make_app
from services.rest.schemas import Problem

SCORE, ADMIN = "score-secret-of-enough-length", "admin-secret-of-enough-length"
KEYS = parse_keys(f"team score {SCORE}\nops admin {ADMIN}\n", "keys")
LIMITS = LimitsConfig(max_body_bytes=200_000, max_inflight_bytes=300_000, max_header_bytes=4096)


@pytest.fixture(scope="module")
def url(serve_app: Callable[[Any], str], backend: Any) -> str:
    return serve_app(make_app(backend, LIMITS))


@pytest.fixture(scope="module")
def keyed(serve_app: Callable[[Any], str], backend: Any) -> str:
    return serve_app(make_app(backend, LIMITS, keyring=KEYS))


@pytest.fixture(autouse=True)
def _well(backend: Any) -> Iterator[None]:
    yield
    backend.faults.clear()


def problem(answer: httpx.Response, status: int, code: str) -> Problem:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    document = Problem.model_validate_json(answer.content)
    assert (document.status, document.code) == (status, code)
    assert document.request_id == answer.headers["x-request-id"]
    return document


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


def score(url: str, data: bytes, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/score", data={"model": "ocr", "prompt": '"1"'}, files={"file": data}, timeout=30, **more)


def npy(image: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, image)
    return buffer.getvalue()


class TestKeys:
    def test_no_key_and_a_wrong_key_are_401(self, keyed: str) -> None:
        for path in ("/v1/models", "/v1/score", "/metrics", "/no/such/path"):
            missing = httpx.get(keyed + path)
            problem(missing, 401, "key_missing")
            assert missing.headers["www-authenticate"] == 'Bearer realm="ddrl rewards"'
        wrong = httpx.get(f"{keyed}/v1/models", headers=bearer("another-secret-of-length"))
        problem(wrong, 401, "key_unknown")
        assert 'error="invalid_token"' in wrong.headers["www-authenticate"]
        problem(httpx.get(f"{keyed}/v1/models", headers={"Authorization": f"Basic {SCORE}"}), 401, "key_missing")
        problem(httpx.get(f"{keyed}/v1/models", headers={"Authorization": "Bearer"}), 401, "key_missing")

    def test_scopes(self, keyed: str) -> None:
        assert httpx.get(f"{keyed}/v1/models", headers=bearer(SCORE)).status_code == 200
        refused = httpx.get(f"{keyed}/metrics", headers=bearer(SCORE))
        problem(refused, 403, "scope_missing")
        assert 'scope="admin"' in refused.headers["www-authenticate"]
        assert httpx.get(f"{keyed}/metrics", headers=bearer(ADMIN)).status_code == 200
        assert httpx.get(f"{keyed}/v1/models", headers=bearer(ADMIN)).status_code == 200

    def test_health_and_the_documents_are_open(self, keyed: str) -> None:
        for path in ("/healthz", "/readyz", "/openapi.json", "/docs"):
            assert httpx.get(keyed + path).status_code == 200
        paths = httpx.get(f"{keyed}/openapi.json").json()["paths"]
        assert paths["/v1/score"]["post"]["security"] == [{"key": ["score"]}]
        assert "security" not in paths["/healthz"]["get"]

    def test_the_body_of_a_stranger_is_not_read(self, keyed: str) -> None:
        with socket.create_connection(_address(keyed), timeout=10) as s:
            s.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 150000\r\nContent-Type: application/json\r\n\r\n")
            assert _status(s) == 401

    def test_a_replay_needs_the_same_key(self, serve_app: Callable[[Any], str], backend: Any, draw: Callable[..., Image]) -> None:
        """Answers belong to the key that asked; another key's identical request is a new one."""
        url, body = serve_app(make_app(backend, LIMITS, keyring=KEYS)), npy(draw("407"))
        for secret, replayed in ((SCORE, None), (ADMIN, None), (SCORE, "true")):
            answer = score(url, body, headers={**bearer(secret), "Idempotency-Key": "same"})
            assert answer.status_code == 200
            assert answer.headers.get("idempotency-replayed") == replayed

    def test_the_client_sends_its_key(self, keyed: str) -> None:
        with pytest.raises(RewardUnavailable, match="see api_key") as refused:
            RestRewardClient(keyed).check(["ocr"])
        assert refused.value.status == 401
        client = RestRewardClient(keyed, api_key=SCORE)
        assert client.check(["ocr"])["ocr"].name == "ocr"
        client.close()


class TestLoopback:
    @pytest.mark.parametrize(
        "headers", [{"Host": "evil.example"}, {"Origin": "https://evil.example"}, {"Origin": "null"}, {"Host": "["}, {"Host": "127.0.0.1.evil.example"}]
    )
    def test_a_page_elsewhere_cannot_reach_a_service_without_keys(self, url: str, headers: dict[str, str]) -> None:
        problem(httpx.get(f"{url}/v1/models", headers=headers), 403, "host_not_allowed")

    @pytest.mark.parametrize("headers", [{"Host": "localhost:80"}, {"Host": "[::1]:80"}, {"Origin": "http://127.0.0.1:8000"}])
    def test_loopback_names_may(self, url: str, headers: dict[str, str]) -> None:
        assert httpx.get(f"{url}/v1/models", headers=headers).status_code == 200

    def test_further_names_are_the_operators_choice(self, serve_app: Callable[[Any], str], backend: Any) -> None:
        url = serve_app(make_app(backend, LIMITS, hosts=["rewards.internal"]))
        assert httpx.get(f"{url}/v1/models", headers={"Host": "rewards.internal"}).status_code == 200


class TestIds:
    def test_an_id_is_echoed_everywhere_and_a_strange_one_replaced(self, url: str) -> None:
        for path in ("/healthz", "/no/such", "/v1/score"):
            assert httpx.get(url + path, headers={"X-Request-ID": "run-7.a_B"}).headers["x-request-id"] == "run-7.a_B"
        for strange in ("a b", "x" * 129, "<script>", "é".encode()):
            new = httpx.get(f"{url}/healthz", headers={"X-Request-ID": strange}).headers["x-request-id"]
            assert len(new) == 32
        assert httpx.get(f"{url}/healthz").headers["x-content-type-options"] == "nosniff"


def _address(url: str) -> tuple[str, int]:
    return "127.0.0.1", int(url.rpartition(":")[2])


def _status(s: socket.socket) -> int:
    data = b""
    while b"\r\n" not in data:
        part = s.recv(4096)
        assert part, "the connection was closed without an answer"
        data += part
    return int(data.split()[1])


class TestHeaders:
    @pytest.mark.parametrize("http", ["h11", "httptools"])
    @pytest.mark.parametrize(
        "headers",
        [
            ["Content-Length: 2", "Content-Length: 30"],
            ["Content-Length: 2, 30"],
            ["Content-Length: -1"],
            ["Content-Length: 1e3"],
            ["Content-Length: +2"],
            ["Content-Length: 2", "Transfer-Encoding: chunked"],
            ["Transfer-Encoding: gzip, chunked"],
            ["Transfer-Encoding: chunked", "Transfer-Encoding: identity"],
            ["Content-Type: application/json", "Content-Type: multipart/form-data", "Content-Length: 2"],
            ["Content-Length: 99999999999999999999999"],
            [f"X-Big: {'x' * 5000}", "Content-Length: 2"],
            *([f"X-{i}: {'x' * 90}" for i in range(50)],),
            ["Content-Encoding: gzip", "Content-Length: 2", "Content-Type: application/json"],
            ["Content-Length: 2", "Bad Header: x"],
        ],
        ids=lambda headers: headers[0][:30],
    )
    def test_tricks_with_framing_are_refused(self, backend: Any, http: Any, headers: list[str]) -> None:
        """Whether the server or the guard notices first: a 4xx, or no answer on a closed connection; never a 200 or 5xx."""
        with _running(make_app(backend, LIMITS), http) as port, socket.create_connection(("127.0.0.1", port), timeout=10) as s:
            lines = ["POST /v1/score HTTP/1.1", "Host: localhost", *headers, "", "{}"]
            s.sendall("\r\n".join(lines).encode())
            s.shutdown(socket.SHUT_WR)
            status = _status(s)
            assert 400 <= status < 500

    def test_a_body_longer_than_it_said_is_cut_off(self, url: str) -> None:
        with socket.create_connection(_address(url), timeout=10) as s:
            s.sendall(b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}" + b"x" * 1000)
            assert _status(s) in (400, 422)  # the server's own parser may notice first


class _running:
    """A uvicorn of its own with the given HTTP parser."""

    def __init__(self, app: Any, http: Any) -> None:
        self._server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", http=http))

    def __enter__(self) -> int:
        import threading
        import time

        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        end = time.monotonic() + 10
        while not self._server.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        return int(self._server.servers[0].sockets[0].getsockname()[1])

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class _Bomb:
    """Unpickling this leaves a trace."""

    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self._trace,)


class TestBodies:
    def test_pickles_are_refused_unopened_in_every_form(self, url: str, tmp_path: Path) -> None:
        trace = tmp_path / "opened"
        poison = pickle.dumps(_Bomb(trace))
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w") as z:
            z.writestr("archive/data.pkl", poison)
        objects = io.BytesIO()
        np.save(objects, np.array([_Bomb(trace)], dtype=object), allow_pickle=True)
        messages = {}
        for name, data in (("pickle", poison), ("zip", archive.getvalue()), ("npy", objects.getvalue())):
            (result,) = score(url, data).json()["results"]
            assert result["error"]["code"] == "media_invalid"
            messages[name] = result["error"]["message"]
            item = {"image": base64.b64encode(data).decode()}
            (result,) = httpx.post(f"{url}/v1/score", json={"model": "ocr", "items": [item]}).json()["results"]
            assert result["error"]["code"] == "media_invalid"
            for kind in ("application/octet-stream", "application/vnd.safetensors"):
                problem(httpx.post(f"{url}/v1/score", content=data, headers={"content-type": kind}), 422, "invalid_request")
            problem(httpx.post(f"{url}/v1/score", content=data, headers={"content-type": "application/x-pickle"}), 415, "unsupported_media_type")
        assert "pickles" in messages["pickle"]
        assert "zip archives" in messages["zip"]
        assert not trace.exists()

    def test_decompression_bombs_are_refused_by_their_header(self, url: str) -> None:
        def chunk(kind: bytes, body: bytes) -> bytes:
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

        start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 1, 0, 0, 0, 0))
        png = start + chunk(b"IDAT", zlib.compress(b"\0" * 1_000_000)) + chunk(b"IEND", b"")
        problem(score(url, png), 413, "image_too_large")
        webp = b"RIFF" + struct.pack("<I", 30) + b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + (16383).to_bytes(3, "little") * 2 + bytes(8)
        problem(score(url, webp), 413, "image_too_large")
        text = start[:-25] + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)) + chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 150_000_000, 9))
        (result,) = score(url, text + chunk(b"IEND", b"")).json()["results"]
        assert result["error"]["code"] == "media_invalid"

    @pytest.mark.parametrize("value", ["/etc/passwd", "file:///etc/passwd", "http://127.0.0.1:1/x.png", "data:image/png;base64,AAAA"])
    def test_paths_and_urls_mean_nothing(self, url: str, value: str) -> None:
        body = {"model": "ocr", "items": [{"prompt": '"1"', "image": value}]}
        answer = httpx.post(f"{url}/v1/score", json=body)
        assert answer.status_code == 422 or answer.json()["results"][0]["error"]["code"] == "media_invalid"
        assert "root:" not in answer.text
        (result,) = score(url, value.encode()).json()["results"]
        assert result["error"]["code"] == "media_invalid"

    def test_nesting_is_bounded_in_every_form(self, url: str) -> None:
        deep = "[" * 5000 + "]" * 5000
        json_body = '{"model": "ocr", "items": ' + deep + "}"
        problem(httpx.post(f"{url}/v1/score", content=json_body, headers={"content-type": "application/json"}), 413, "json_too_large")
        form = {"reward": "ocr", "combine": deep}
        problem(httpx.post(f"{url}/v1/score", data=form, files={"file": b"x"}), 413, "json_too_large")
        header = json.dumps({"__metadata__": {"request": deep}}).encode()
        body = len(header).to_bytes(8, "little") + header
        problem(httpx.post(f"{url}/v1/score", content=body, headers={"content-type": "application/octet-stream"}), 413, "json_too_large")
        body = len(deep).to_bytes(8, "little") + deep.encode()
        problem(httpx.post(f"{url}/v1/score", content=body, headers={"content-type": "application/octet-stream"}), 422, "invalid_request")

    def test_brackets_inside_strings_are_not_nesting(self, url: str, draw: Callable[..., Image]) -> None:
        item = {"prompt": "[" * 50 + '\\"' + '"407"', "image": base64.b64encode(npy(draw("407"))).decode()}
        assert httpx.post(f"{url}/v1/score", json={"model": "ocr", "items": [item]}).status_code == 200

    def test_memory_in_flight_is_bounded(self, url: str, backend: Any, draw: Callable[..., Image]) -> None:
        """Two bodies of 199 kB exceed 300 kB: the second is refused while the first is worked on, and fits afterwards."""
        body = npy(np.full((250, 260, 3), 255, np.uint8))

        async def both() -> list[httpx.Response]:
            async def hold() -> None:
                await asyncio.sleep(1.0)

            backend.faults["ocr"] = hold
            async with httpx.AsyncClient(timeout=30) as client:
                first = asyncio.create_task(client.post(f"{url}/v1/score", data={"model": "ocr"}, files={"file": body}))
                await asyncio.sleep(0.5)
                second = await client.post(f"{url}/v1/score", data={"model": "ocr"}, files={"file": body})
                return [await first, second]

        first, second = asyncio.run(both())
        assert first.status_code == 200
        problem(second, 503, "overloaded")
        assert int(second.headers["retry-after"]) >= 1
        assert score(url, body).status_code == 200
