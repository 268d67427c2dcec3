"""The REST clients, sync and async, against a real server that misbehaves on request."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response

from services.client.aio import AsyncRewardClient
from services.client.base import UNAVAILABLE, RewardClient, RewardUnavailable
from services.client.rest import RestRewardClient
from services.client.retry import Backoff
from services.client.wire import Exchange, Keys, MultiScores
from services.contract import ItemScore, ScoreFailure
from services.limits import LimitsConfig
from services.media.base import Media
from services.rest.requests import parse_call
from services.rest.schemas import Combine

IMAGES = np.zeros((3, 16, 48, 3), np.uint8)
PROMPTS = ['"1"', '"2"', '"3"']


class Script:
    """What the server answers next: a status (with Retry-After), 'garbage', 'short', or a score of 0.25."""

    def __init__(self) -> None:
        self.steps: list[Any] = []
        self.last: Any = 200
        self.seen: list[dict[str, str]] = []
        self.times: list[float] = []
        self.calls: list[Any] = []
        self.down: dict[str, tuple[str, str]] = {}  # rewards that fail as a whole: code and message
        self._lock = threading.Lock()

    def answer(self, headers: dict[str, str], call: Any) -> Response:
        images = len(call.prompts)
        with self._lock:
            self.calls.append(call)
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
        if call.options.rewards is not None:
            rewards = {name: {"revision": "r", "preprocessing_hash": "h", "results": [self._item(name, item)] * count} for name in call.options.rewards}
            totals = [{"total": 0.5, "parts": {}}] * (count - 1) + [{"error": {"code": "part_failed", "message": "m"}}]
            return JSONResponse({"request_id": "i", "rewards": rewards, **({"combined": totals} if call.options.combine else {})})
        return JSONResponse({"model": "ocr", "revision": "r", "results": [item] * count, "new_field": 1})

    def _item(self, name: str, scored: dict[str, Any]) -> dict[str, Any]:
        if name not in self.down:
            return scored
        code, message = self.down[name]
        return {"error": {"code": code, "message": message, "retryable": True}}


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(serve_app: Callable[[Any], str], script: Script) -> str:
    app = FastAPI()

    @app.post("/v1/score")
    async def score(request: Request) -> Response:
        body = await request.body()
        call = await asyncio.to_thread(parse_call, request.headers["content-type"], body, LimitsConfig())
        return script.answer(dict(request.headers), call)

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        info = {"revision": "r", "media": ["image", "video"], "reward": "flow_grpo", "sub_scores": ["flow_grpo"], "new_field": 1}
        every = {"name": "ocr", **info, "frame_spec": {"kind": "stride", "stride": 4}}
        return {"models": [every, {**every, "name": "all", "frame_spec": {"kind": "all"}}]}

    return serve_app(app)


class Blocking:
    """The async client behind the sync protocol, in a loop of its own."""

    def __init__(self, url: str, **settings: Any) -> None:
        self._runner = asyncio.Runner()

        async def make() -> AsyncRewardClient:
            return AsyncRewardClient(url, concurrency=1, **settings)

        self._client = self._runner.run(make())

    def score(self, *args: Any, **more: Any) -> Any:
        return self._runner.run(self._client.score(*args, **more))

    def score_many(self, *args: Any, **more: Any) -> MultiScores:
        return self._runner.run(self._client.score_many(*args, **more))

    def score_all(self, *args: Any, **more: Any) -> Any:
        return self._runner.run(self._client.score_all(*args, **more))

    def info(self, names: list[str]) -> Any:
        return self._runner.run(self._client.info(names))

    def check(self, names: list[str]) -> Any:
        return self._runner.run(self._client.check(names))

    def close(self) -> None:
        self._runner.run(self._client.close())
        self._runner.close()


Make = Callable[..., Any]


@pytest.fixture(params=[RestRewardClient, Blocking], ids=["sync", "async"])
def make(request: pytest.FixtureRequest) -> Iterator[Make]:
    made: list[RewardClient] = []

    def build(url: str, **settings: Any) -> Any:
        made.append(request.param(url, **settings))
        return made[-1]

    yield build
    for client in made:
        client.close()


def test_500_and_transport_trouble_cost_only_retries(make: Make, url: str, script: Script) -> None:
    script.steps = [500, 503, 408, 502]
    client = make(url, api_key="k")
    scores = client.score("ocr", PROMPTS, IMAGES, 30)
    assert scores == [ItemScore(0.25, {"flow_grpo": 0.25}, "7")] * 3
    assert len(script.seen) == 5
    assert script.seen[0]["authorization"] == "Bearer k"


def test_retry_after_is_honoured(make: Make, url: str, script: Script) -> None:
    script.steps = [429]
    make(url).score("ocr", PROMPTS, IMAGES, 30)
    assert script.times[1] - script.times[0] >= 1.0


def test_persistent_500_is_one_clear_error(make: Make, url: str, script: Script) -> None:
    script.last = 500
    started = time.monotonic()
    with pytest.raises(RewardUnavailable) as failed:
        make(url).score("ocr", PROMPTS, IMAGES, 1.5)
    assert time.monotonic() - started < 20
    assert failed.value.status == 500
    assert url in str(failed.value)
    assert "code_500: because" in str(failed.value)
    assert "service's log" in str(failed.value)
    assert len(script.seen) > 1


@pytest.mark.parametrize(
    ("error", "at_last"),
    [
        (httpx.ReadTimeout("no answer in time"), "then no answer in time"),
        (httpx.ConnectError("refused"), r"then cannot be reached \(ConnectError: refused\)"),
    ],
)
def test_what_the_service_said_is_told_though_the_last_attempt_got_no_answer(error: httpx.TransportError, at_last: str) -> None:
    now = [0.0]
    exchange = Exchange("reward service http://x", Backoff(1.0, clock=lambda: now[0]), 1.0, Keys(), None)
    assert exchange.answered(httpx.Response(500, json={"title": "t", "status": 500, "code": "broken", "detail": "because"})) is not None
    now[0] = 1.0  # the deadline cuts the second attempt short
    with pytest.raises(RewardUnavailable, match=f"HTTP 500.*because.*{at_last}, 2 attempts in 1 s.*service's log") as failed:
        exchange.unreachable(error)
    assert failed.value.status == 500


@pytest.mark.parametrize(("status", "advice"), [(401, "api_key"), (404, "Check url"), (422, "that url points")])
def test_refusals_are_not_retried(make: Make, url: str, script: Script, status: int, advice: str) -> None:
    script.last = status
    with pytest.raises(RewardUnavailable, match=advice) as failed:
        make(url).score("ocr", PROMPTS, IMAGES, 30)
    assert failed.value.status == status
    assert len(script.seen) == 1


@pytest.mark.parametrize("answer", ["garbage", "short"])
def test_an_answer_outside_the_contract_is_an_error(make: Make, url: str, script: Script, answer: str) -> None:
    script.last = answer
    with pytest.raises(RewardUnavailable):
        make(url).score("ocr", PROMPTS, IMAGES, 30)


def test_unreachable(make: Make) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    client = make(f"http://127.0.0.1:{port}", check_timeout_s=1.0)
    with pytest.raises(RewardUnavailable, match=f"127.0.0.1:{port}.*cannot be reached.*that url names") as failed:
        client.check(["ocr"])
    assert failed.value.status is None


def test_check_scores_for_real(make: Make, url: str, script: Script) -> None:
    assert make(url).check(["ocr"])["ocr"].revision == "r"
    assert len(script.seen) == 1
    with pytest.raises(RewardUnavailable, match="It has: ocr"):
        make(url).check(["other"])
    script.last = 500
    with pytest.raises(RewardUnavailable, match="HTTP 500"):
        make(url, check_timeout_s=2).check(["ocr"])


def test_large_batches_are_split(make: Make, url: str, script: Script) -> None:
    client = make(url, chunk_bytes=IMAGES[:2].nbytes)
    assert len(client.score("ocr", PROMPTS, IMAGES, 30)) == 3
    assert len(script.seen) == 2
    assert client.score("ocr", [], IMAGES[:0], 30) == []


def test_repeats_share_their_idempotency_key_and_say_the_deadline(make: Make, url: str, script: Script) -> None:
    script.steps = [503, 409]
    make(url, chunk_items=2).score("ocr", PROMPTS, IMAGES, 30)
    keys = [headers["idempotency-key"] for headers in script.seen]
    assert keys[0] == keys[1] == keys[2] != keys[3]
    assert all(0 < float(headers["x-timeout-s"]) <= 30 for headers in script.seen)


@pytest.mark.parametrize("encoding", ["npy", "safetensors"])
def test_only_the_frames_of_the_frame_spec_travel(make: Make, url: str, script: Script, encoding: str) -> None:
    clips = np.arange(10, dtype=np.uint8)[None, :, None, None, None].repeat(3, -1)
    client = make(url, encoding=encoding)
    client.score("ocr", PROMPTS[:1], clips, 30, fps=8.0)
    client.score_many(["ocr", "all"], PROMPTS[:1], clips, 30, fps=8.0)
    reduced, whole = ([m for plan in call.plans for m in plan.decode()] for call in script.calls)
    assert (reduced[0].frames[:, 0, 0, 0].tolist(), reduced[0].selected) == ([0, 4, 8], True)
    assert (len(whole[0].frames), whole[0].selected) == (10, False)
    with pytest.raises(RewardUnavailable, match="no model 'other'"):
        client.score("other", PROMPTS[:1], clips, 30, fps=8.0)


@pytest.mark.parametrize("encoding", ["npy", "safetensors", "png"])
def test_several_rewards(make: Make, url: str, script: Script, encoding: str) -> None:
    client = make(url, encoding=encoding, chunk_items=2)
    combine = Combine(weights={"ocr": 1.0, "all.flow_grpo": 0.5}, total_clip=(-1, 1))
    answer = client.score_many(["ocr", "all"], PROMPTS, IMAGES, 30, combine=combine)
    assert {name: len(results) for name, results in answer.results.items()} == {"ocr": 3, "all": 3}
    assert answer.totals == [0.5, ScoreFailure("part_failed", "m"), ScoreFailure("part_failed", "m")]
    assert script.calls[0].options.combine == combine
    assert client.score_many(["ocr"], [], IMAGES[:0], 30).results == {"ocr": []}


@pytest.mark.parametrize("encoding", ["npy", "safetensors", "png"])
def test_items_of_many_kinds(make: Make, url: str, script: Script, encoding: str) -> None:
    client = make(url, encoding=encoding)
    sizes = [Media(np.full((1, 4 + i, 5, 3), i, np.uint8)) for i in range(3)]
    client.score("ocr", PROMPTS, sizes, 30)
    kinds = [sizes[0], Media(np.zeros((2, 4, 5, 3), np.uint8), 8.0), Media(np.zeros((3, 4, 5, 3), np.uint8), 16.0)]
    client.score("all", PROMPTS, kinds, 30)
    first, second = ([m for plan in call.plans for m in plan.decode()] for call in script.calls)
    assert [m.frames.shape for m in first] == [m.frames.shape for m in sizes]
    assert [(m.frames.shape, m.fps) for m in second] == [(m.frames.shape, m.fps) for m in kinds]


@pytest.mark.parametrize("encoding", ["npy", "safetensors"])
def test_arrays_of_any_memory_layout_arrive_as_they_are(make: Make, url: str, script: Script, encoding: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 3, 4, 5), dtype=np.uint8).transpose(0, 2, 3, 1)
    make(url, encoding=encoding).score("ocr", PROMPTS, pixels, 30)
    make(url, encoding=encoding).score("ocr", PROMPTS[:2], [Media.image(pixels[0]), Media.image(pixels[1, :3])], 30)
    same, mixed = ([m.pixels for plan in call.plans for m in plan.decode()] for call in script.calls)
    assert np.array_equal(np.stack(same), pixels)
    assert np.array_equal(mixed[0], pixels[0])
    assert np.array_equal(mixed[1], pixels[1, :3])


def test_all_rewards_of_a_run_at_once(make: Make, url: str, script: Script) -> None:
    client = make(url)
    assert client.info(["all", "ocr"])["all"].sub_scores == ["flow_grpo"]
    assert {name: len(results) for name, results in client.score_all(["ocr", "all"], PROMPTS, IMAGES, 30).items()} == {"ocr": 3, "all": 3}
    assert [call.options.rewards for call in script.calls] == [["ocr", "all"]]
    client.score_all(["ocr"], PROMPTS, IMAGES, 30)
    assert script.calls[-1].options.model == "ocr", "the form that the smallest service understands"


def test_a_reward_that_fails_as_a_whole_fails_alone(make: Make, url: str, script: Script) -> None:
    script.down = {"all": ("scorer_unavailable", "all has not come up yet")}
    found = make(url).score_all(["ocr", "all"], PROMPTS, IMAGES, 30)
    assert [type(result) for result in found["ocr"]] == [ItemScore] * 3
    assert [(r.code, r.retryable) for r in found["all"]] == [(UNAVAILABLE, True)] * 3
    assert "scorer_unavailable: all has not come up yet" in found["all"][0].message
    script.down["ocr"] = ("queue_full", "full")
    with pytest.raises(RewardUnavailable, match="queue_full"):
        make(url).score_all(["ocr", "all"], PROMPTS, IMAGES, 30)


def test_nobody_there_is_said_at_once_where_that_is_asked_for(make: Make) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    started = time.monotonic()
    with pytest.raises(RewardUnavailable, match=r"cannot be reached.*given up after [0-2] s.*that --url names"):
        make(f"http://127.0.0.1:{port}", connect_s=0.5, keys=Keys(url="--url")).score("ocr", PROMPTS, IMAGES, 60)
    assert time.monotonic() - started < 10
