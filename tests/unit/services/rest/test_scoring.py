"""Scoring through the REST app: several rewards, totals, clips, tensors, isolation, deadlines, cancellation, replay."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from safetensors.numpy import save

from services.client.aio import AsyncRewardClient
from services.client.rest import RestRewardClient
from services.contract import ItemScore, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Image, Media
from services.rest.ingress import make_app
from services.rest.schemas import Combine, MultiScoreResponse, Problem, ScoreResponse

LIMITS = LimitsConfig(max_pixels=100_000, max_total_pixels=2_000_000)


def decode_latent(latent: Image, fps: float | None) -> Image:
    """A toy decoder: [3, H, W] or [3, T, H, W] in [0, 1] → pixels; one value is refused."""
    if latent.max() > 1:
        raise ValueError("out of range")
    return np.moveaxis((latent * 255).round().astype(np.uint8), 0, -1)


@pytest.fixture(scope="module")
def url(serve_app: Callable[[Any], str], backend: Any) -> str:
    return serve_app(make_app(backend, LIMITS, decoder=decode_latent))


@pytest.fixture(autouse=True)
def _well(backend: Any) -> Iterator[None]:
    yield
    backend.faults.clear()
    backend.seen.clear()


def npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def clip(frames: int = 12) -> Image:
    """Frame i is grey level 16 i."""
    return np.broadcast_to((np.arange(frames, dtype=np.uint8) * 16)[:, None, None, None], (frames, 64, 96, 3)).copy()


def post(url: str, body: Any = None, headers: dict[str, str] | None = None, **more: Any) -> httpx.Response:
    if body is not None:
        more["json"] = body
    return httpx.post(f"{url}/v1/score", headers=headers, timeout=60, **more)


def problem(answer: httpx.Response, status: int, code: str) -> Problem:
    assert answer.status_code == status, answer.text
    document = Problem.model_validate_json(answer.content)
    assert document.code == code
    assert document.request_id == answer.headers["x-request-id"]
    return document


def image64(draw: Callable[..., Image], text: str = "407") -> str:
    return base64.b64encode(npy(draw(text))).decode()


def test_several_rewards_and_their_total(url: str, draw: Callable[..., Image]) -> None:
    items = [{"prompt": '"407"', "image": image64(draw)}, {"prompt": "none", "image": image64(draw)}, {"prompt": '"409"', "image": image64(draw)}]
    combine = {"weights": {"ocr": 2.0, "scene.brightness+contrast": 0.5, "ocr.strict": 1.0}, "clip": {"ocr": [0, 0.7]}, "total_clip": [-5, 2.1]}
    answer = MultiScoreResponse.model_validate_json(post(url, {"rewards": ["ocr", "scene"], "combine": combine, "items": items}).content)
    assert list(answer.rewards) == ["ocr", "scene"]
    ocr, scene = answer.rewards["ocr"].results, answer.rewards["scene"].results
    assert [r.reward for r in ocr] == [1.0, None, pytest.approx(2 / 3)]
    assert all(r.reward is not None for r in scene)
    assert answer.combined is not None
    whole, lacking, near = answer.combined
    assert scene[0].scores is not None
    look = scene[0].scores["brightness"] + scene[0].scores["contrast"]
    assert whole.parts == {"ocr": 0.7, "scene.brightness+contrast": pytest.approx(look), "ocr.strict": 1.0}
    assert whole.total == 2.1
    assert lacking.error is not None
    assert (lacking.error.code, lacking.error.retryable) == ("part_failed", False)
    assert near.total == pytest.approx(2 * 2 / 3 + 0.5 * look + 2 / 3) or near.total == 2.1
    hashes = [answer.rewards[name].preprocessing_hash for name in ("ocr", "scene")]
    assert len(set(hashes)) == 2
    assert all(len(h) == 12 for h in hashes)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"rewards": ["ocr", "ocr"]}, "twice"),
        ({"rewards": ["ocr"], "model": "ocr"}, "not both"),
        ({"model": "ocr", "combine": {"weights": {"ocr": 1}}}, "needs rewards"),
        ({"rewards": ["ocr"], "combine": {"weights": {"scene": 1}}}, "not in rewards"),
        ({"rewards": ["ocr"], "combine": {"weights": {"ocr.nope": 1}}}, "no sub-score 'nope'"),
        ({"rewards": ["ocr"], "combine": {"weights": {"ocr.": 1}}}, "no sub-score"),
        ({"rewards": ["ocr"], "combine": {"weights": {"ocr": 1}, "clip": {"ocr": [1, 0]}}}, "above the upper"),
        ({"rewards": ["ocr"], "combine": {"weights": {"ocr": 1}, "clip": {"x": [0, 1]}}}, "no weight"),
        ({"rewards": []}, "at least 1"),
        ({"model": "ocr", "timeout_s": 0}, "greater than 0"),
        ({"model": "../ocr"}, "pattern"),
    ],
)
def test_options_that_contradict_are_refused(url: str, draw: Callable[..., Image], fields: dict[str, Any], says: str) -> None:
    answer = post(url, {**fields, "items": [{"prompt": '"1"', "image": image64(draw)}]})
    assert says in problem(answer, 422, "invalid_request").detail


def test_a_clip_in_every_form(url: str, backend: Any, mp4: Callable[..., bytes]) -> None:
    """mp4 and npy, by form, JSON and safetensors; the reward gets its frames only."""
    frames, encoded = clip(), mp4(clip())
    answers = [
        post(url, data={"model": "scene", "prompt": "p"}, files=[("file", ("c.mp4", encoded))]),
        post(url, {"model": "scene", "items": [{"video": base64.b64encode(encoded).decode()}]}),
        post(url, data={"model": "scene", "fps": "16"}, files=[("file", ("c.npy", npy(frames)))]),
        post(url, {"model": "scene", "items": [{"video": base64.b64encode(npy(frames)).decode(), "fps": 16}]}),
        post(
            url,
            content=save({"media": frames[None]}, {"request": '{"model": "scene", "items": [{"fps": 16}]}'}),
            headers={"content-type": "application/vnd.safetensors"},
        ),
    ]
    results = [ScoreResponse.model_validate_json(answer.content).results[0] for answer in answers]
    assert all(r.error is None for r in results), results
    scores = [r.scores for r in results]
    assert scores[2] == scores[3] == scores[4]
    assert scores[0] == scores[1]
    assert scores[0] is not None
    assert scores[0]["motion"] == pytest.approx(scores[2]["motion"], abs=0.02)  # type: ignore[index]
    assert all(media[0].selected and media[0].fps == 16 for _, media in backend.seen)


def test_media_a_reward_does_not_take_fail_alone(url: str, mp4: Callable[..., bytes]) -> None:
    files = [("file", ("c", mp4(clip()))), ("file", ("i", npy(clip()[0]))), ("file", ("j", b"\0\0\0\x18ftypisomjunk"))]
    answer = post(url, data={"reward": ["ocr", "scene"], "prompt": ['"1"', '"1"', '"1"']}, files=files)
    rewards = MultiScoreResponse.model_validate_json(answer.content).rewards
    codes = {name: [r.error.code if r.error else None for r in reward.results] for name, reward in rewards.items()}
    assert codes == {"ocr": [None, None, "media_invalid"], "scene": [None, None, "media_invalid"]}


def test_tensors_of_many_sizes_and_latents(url: str, draw: Callable[..., Image]) -> None:
    headers = {"content-type": "application/octet-stream"}
    request = json.dumps({"model": "ocr", "items": [{"prompt": '"407"'}, {"prompt": '"13"'}]})
    wide = np.hstack([draw("13"), np.full((16, 8, 3), 255, np.uint8)])
    pixels = post(url, content=save({"media.0": draw("407"), "media.1": wide}, {"request": request}), headers=headers)
    assert [r["reward"] for r in pixels.json()["results"]] == [1.0, 1.0]
    latent = np.moveaxis(draw("407").astype(np.float32) / 255, -1, 0)
    latents = np.ascontiguousarray(np.stack([latent, latent * 2]), np.float16)
    answer = post(url, content=save({"latents": latents}, {"request": request}), headers=headers)
    first, second = answer.json()["results"]
    assert first["reward"] == 1.0
    assert second["error"]["code"] == "media_invalid"
    assert "out of range" not in answer.text


@pytest.mark.parametrize(
    ("tensors", "request_json", "says"),
    [
        ({"media": np.zeros((1, 4, 4, 3), np.uint8)}, '{"items": [{}, {}]}', "2 items"),
        ({"media": np.zeros((1, 4, 4, 4), np.uint8)}, '{"items": [{}]}', "pixels must be"),
        ({"media": np.zeros((1, 4, 4, 3), np.float32)}, '{"items": [{}]}', "send one tensor"),
        ({"other": np.zeros((1, 4, 4, 3), np.uint8)}, '{"items": [{}]}', "send one tensor"),
        ({"media": np.zeros((1, 4, 4, 3), np.uint8)}, "{}", "items"),
        ({"media": np.zeros((1, 4, 4, 3), np.uint8)}, "nonsense", "Invalid JSON"),
        ({"latents": np.zeros((1, 4), np.float32)}, '{"items": [{}]}', "hold 1 items"),
        ({"latents.0": np.zeros((4,), np.float32)}, '{"items": [{}]}', "latents must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(url: str, tensors: dict[str, Any], request_json: str, says: str) -> None:
    answer = post(url, content=save(tensors, {"request": request_json}), headers={"content-type": "application/vnd.safetensors"})
    assert says in problem(answer, 422, "invalid_request").detail


def test_one_reward_fails_alone_in_company_and_loudly_by_itself(url: str, backend: Any, draw: Callable[..., Image]) -> None:
    async def full() -> None:
        raise ProblemError(503, "queue_full", "the queue of ocr is full", retry_after_s=3)

    backend.faults["ocr"] = full
    items = [{"prompt": '"407"', "image": image64(draw)}]
    answer = post(url, {"rewards": ["ocr", "scene"], "items": items})
    rewards = MultiScoreResponse.model_validate_json(answer.content).rewards
    assert rewards["scene"].results[0].reward is not None
    error = rewards["ocr"].results[0].error
    assert error is not None
    assert (error.code, error.retryable) == ("queue_full", True)
    alone = post(url, {"model": "ocr", "items": items})
    problem(alone, 503, "queue_full")
    assert alone.headers["retry-after"] == "3"
    problem(post(url, {"rewards": ["ocr"], "items": items}), 503, "queue_full")

    async def bug() -> None:
        raise RuntimeError("secret")

    backend.faults["ocr"] = bug
    answer = post(url, {"rewards": ["ocr", "scene"], "items": items})
    assert answer.json()["rewards"]["ocr"]["results"][0]["error"] == {"code": "internal_error", "message": "ocr failed on this request", "retryable": False}


@pytest.mark.parametrize("how", ["header", "field"])
def test_the_deadline_is_kept(url: str, backend: Any, draw: Callable[..., Image], how: str) -> None:
    cancelled = []

    async def sleep() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.append(True)

    backend.faults["ocr"] = sleep
    body: dict[str, Any] = {"model": "ocr", "items": [{"prompt": '"407"', "image": image64(draw)}]}
    answer = post(url, body, {"X-Timeout-S": "0.3"}) if how == "header" else post(url, {**body, "timeout_s": 0.3})
    problem(answer, 504, "deadline_exceeded")
    assert cancelled == [True]
    problem(post(url, body, {"X-Timeout-S": "nan"}), 422, "invalid_request")


def test_a_client_that_leaves_takes_its_work_with_it(url: str, backend: Any, draw: Callable[..., Image]) -> None:
    state: list[str] = []

    async def sleep() -> None:
        state.append("started")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            state.append("cancelled")
            raise

    async def leave() -> None:
        async with AsyncRewardClient(url) as client:
            task = asyncio.create_task(client.score("ocr", ['"407"'], [Media.image(draw("407"))], 30))
            while not state:
                await asyncio.sleep(0.01)
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    backend.faults["ocr"] = sleep
    asyncio.run(asyncio.wait_for(leave(), 20))
    end = time.monotonic() + 10
    while state != ["started", "cancelled"]:
        assert time.monotonic() < end, state
        time.sleep(0.01)


def test_an_idempotency_key_replays_the_same_answer(url: str, backend: Any, draw: Callable[..., Image]) -> None:
    body = {"model": "ocr", "items": [{"prompt": '"407"', "image": image64(draw)}]}
    key = {"Idempotency-Key": "once-and-again"}
    first, again = post(url, body, key), post(url, body, key)
    assert first.content == again.content
    assert (first.headers.get("idempotency-replayed"), again.headers.get("idempotency-replayed")) == (None, "true")
    assert len(backend.seen) == 1
    form = post(url, data={"model": "ocr", "prompt": "other"}, files={"file": b"x"}, headers=key)
    problem(form, 422, "idempotency_mismatch")
    problem(post(url, body, {"Idempotency-Key": "a b"}), 422, "invalid_request")


def test_what_failed_is_not_replayed_and_what_runs_is_refused(url: str, backend: Any, draw: Callable[..., Image]) -> None:
    async def full() -> None:
        raise ProblemError(503, "queue_full", "full", retry_after_s=1)

    body = {"rewards": ["ocr", "scene"], "items": [{"prompt": '"407"', "image": image64(draw)}]}
    backend.faults["ocr"] = full
    assert "queue_full" in post(url, body, {"Idempotency-Key": "k2"}).text
    backend.faults.clear()
    assert post(url, body, {"Idempotency-Key": "k2"}).json()["rewards"]["ocr"]["results"][0]["reward"] == 1.0

    async def both() -> list[httpx.Response]:
        async def wait() -> None:
            await asyncio.sleep(1.0)

        backend.faults["ocr"] = wait
        async with httpx.AsyncClient() as client:
            calls = [client.post(f"{url}/v1/score", json=body, headers={"Idempotency-Key": "k3"}, timeout=30) for _ in range(2)]
            return list(await asyncio.gather(*calls))

    answers = sorted(asyncio.run(both()), key=lambda a: a.status_code)
    assert answers[0].status_code == 200
    problem(answers[1], 409, "idempotency_in_progress")


def test_the_clients_against_the_service(url: str, draw: Callable[..., Image]) -> None:
    media = [Media.image(draw("407")), Media(clip(), fps=16.0)]
    sync = RestRewardClient(url)

    async def aio() -> Any:
        async with AsyncRewardClient(url, chunk_items=1) as client:
            assert (await client.check(["ocr"]))["ocr"].name == "ocr"
            return await client.score_many(["ocr", "scene"], ['"407"', '"1"'], media, 30, combine=Combine(weights={"ocr": 1.0}))

    one, other = sync.score_many(["ocr", "scene"], ['"407"', '"1"'], media, 30, combine=Combine(weights={"ocr": 1.0})), asyncio.run(aio())
    sync.close()
    assert one == other
    assert isinstance(one.results["ocr"][0], ItemScore)
    assert one.totals is not None
    assert one.totals[0] == 1.0
    assert not any(isinstance(r, ScoreFailure) for r in one.results["scene"])
