"""The REST client against a real server that misbehaves on request."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.client.base import ItemScore, RewardUnavailable
from services.client.rest import RestRewardClient

IMAGES = np.zeros((3, 16, 48, 3), np.uint8)
PROMPTS = ['"1"', '"2"', '"3"']


class Script:
    """What the server answers next: a status (with Retry-After), 'garbage', 'short', or a score of 0.25."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.last: Any = 200
        self.seen: list[dict[str, str]] = []
        self.times: list[float] = []
        self._lock = threading.Lock()

    def answer(self, headers: dict[str, str], images: int) -> Response:
        with self._lock:
            step = self.steps.pop(0) if self.steps else self.last
            self.seen.append(headers)
            self.times.append(time.monotonic())
        if step == "garbage":
            return Response("<html>", 200)
        if isinstance(step, int) and step != 200:
            body = {"title": "t", "status": step, "code": f"code_{step}", "detail": "because"}
            return JSONResponse(body, step, {"Retry-After": "1"} if step == 429 else {})
        item = {"reward": 0.25, "scores": {"flow_grpo": 0.25}, "text": "7", "new_field": 1}
        count = images - 1 if step == "short" else images
        return JSONResponse({"model": "ocr", "revision": "r", "results": [item] * count, "new_field": 1})


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(serve_app: Callable[[Any], str], script: Script) -> str:
    app = FastAPI()

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        async with request.form() as form:
            images = len(form.getlist("prompt"))
        return script.answer(dict(request.headers), images)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        info = {"revision": "r", "media": ["image"], "reward": "flow_grpo", "sub_scores": ["flow_grpo"]}
        return {"models": [{"name": "ocr", **info}]}

    return serve_app(app)


def test_500_and_transport_trouble_cost_only_retries(url: str, script: Script) -> None:
    script.steps = [500, 503, 408, 502]
    client = RestRewardClient(url, api_key="k")
    scores = client.score("ocr", PROMPTS, IMAGES, 30)
    assert scores == [ItemScore(0.25, {"flow_grpo": 0.25}, "7")] * 3
    assert len(script.seen) == 5
    assert script.seen[0]["authorization"] == "Bearer k"


def test_retry_after_is_honoured(url: str, script: Script) -> None:
    script.steps = [429]
    RestRewardClient(url).score("ocr", PROMPTS, IMAGES, 30)
    assert script.times[1] - script.times[0] >= 1.0


def test_persistent_500_is_one_clear_error(url: str, script: Script) -> None:
    script.last = 500
    started = time.monotonic()
    with pytest.raises(RewardUnavailable) as failed:
        RestRewardClient(url).score("ocr", PROMPTS, IMAGES, 1.5)
    assert time.monotonic() - started < 3
    assert failed.value.status == 500
    assert url in str(failed.value)
    assert "code_500: because" in str(failed.value)
    assert "service's log" in str(failed.value)
    assert len(script.seen) > 1


@pytest.mark.parametrize(("status", "advice"), [(401, "api_key_env"), (404, "reward.url"), (422, "reward.url")])
def test_refusals_are_not_retried(url: str, script: Script, status: int, advice: str) -> None:
    script.last = status
    with pytest.raises(RewardUnavailable, match=advice) as failed:
        RestRewardClient(url).score("ocr", PROMPTS, IMAGES, 30)
    assert failed.value.status == status
    assert len(script.seen) == 1


@pytest.mark.parametrize("answer", ["garbage", "short"])
def test_an_answer_outside_the_contract_is_an_error(url: str, script: Script, answer: str) -> None:
    script.last = answer
    with pytest.raises(RewardUnavailable):
        RestRewardClient(url).score("ocr", PROMPTS, IMAGES, 30)


def test_unreachable() -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    client = RestRewardClient(f"http://127.0.0.1:{port}", check_timeout_s=1.0)
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port}.*cannot be reached.*reward.url") as failed:
        client.check()
    assert failed.value.status is None


def test_check_scores_for_real(url: str, script: Script) -> None:
    assert RestRewardClient(url).check().revision == "r"
    assert len(script.seen) == 1
    with pytest.raises(RewardUnavailable, match="one of: ocr"):
        RestRewardClient(url, model="other").check()
    script.last = 500
    with pytest.raises(RewardUnavailable, match="HTTP 500"):
        RestRewardClient(url, check_timeout_s=0.5).check()


def test_large_batches_are_split(url: str, script: Script) -> None:
    client = RestRewardClient(url, chunk_bytes=IMAGES[:2].nbytes)
    assert len(client.score("ocr", PROMPTS, IMAGES, 30)) == 3
    assert len(script.seen) == 2
    assert client.score("ocr", [], IMAGES[:0], 30) == []
