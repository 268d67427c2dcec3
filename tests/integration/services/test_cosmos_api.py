"""`/api/reward/*` spoken byte for byte as cosmos-rl's trainers do: their bodies, headers, polling and parsing."""

from __future__ import annotations

import http.client
import io
import json
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import numpy as np
import pytest

from services.config import FleetConfig
from services.fleet.file import parse_fleet
from tests.integration.services.conftest import fleet
from tests.integration.services.probe_scorers import KIND

Serve = Callable[[FleetConfig], httpx.Client]
AGENT = {"User-Agent": "python-requests/2.32.5", "Accept-Encoding": "gzip, deflate", "Accept": "*/*", "Connection": "keep-alive"}


class Trainer:
    """What the trainers' client sends; ``token`` is empty where they have none."""

    def __init__(self, url: httpx.URL, token: str = "") -> None:
        self.host, self.port, self.token = url.host, url.port, token

    def post(self, path: str, body: bytes, content_type: str) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=30)
        connection.putrequest("POST", path, skip_accept_encoding=True)
        for name, value in {**AGENT, "Content-Type": content_type, "Authorization": f"Bearer {self.token}", "Content-Length": str(len(body))}.items():
            connection.putheader(name, value)
        connection.endheaders(body)
        answer = connection.getresponse()
        status, text = answer.status, answer.read()
        connection.close()
        return status, json.loads(text)

    def enqueue(self, tensor: np.ndarray[Any, Any], data: dict[str, Any]) -> str:
        buffer = io.BytesIO()
        np.save(buffer, tensor, allow_pickle=False)
        payload = json.dumps(data).encode("utf-8") + b"\n" + buffer.getvalue()
        status, answer = self.post("/api/reward/enqueue", payload, "application/octet-stream")
        assert status == 200, answer
        assert list(answer) == ["uuid"]
        return str(answer["uuid"])

    def pull(self, job: str, kind: str | None) -> tuple[int, dict[str, Any]]:
        fields = {"uuid": job, **({} if kind is None else {"type": kind})}
        return self.post("/api/reward/pull", urlencode(fields).encode(), "application/x-www-form-urlencoded")

    def wait(self, job: str, kind: str) -> tuple[int, dict[str, Any], list[int]]:
        """As their example does: again and again while the status is 400."""
        seen: list[int] = []
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            status, answer = self.pull(job, kind)
            if status != 400:
                return status, answer, seen
            seen.append(status)
            time.sleep(0.05)
        raise AssertionError("no scores")


IMAGES = np.random.default_rng(3).integers(0, 256, (2, 16, 12, 3), dtype=np.uint8)


def test_acceptance_8_cosmos_images_from_enqueue_to_scores(rest: Serve, redis_url: str) -> None:
    trainer = Trainer(rest(fleet(redis_url, delay_s=0.4)).base_url)
    data = {"prompts": ["one", "two"], "reward_fn": {"mean": 0.5, "ocr": 0.0}, "media_type": "image"}
    assert trainer.post("/api/reward/ping", urlencode({"info_data": json.dumps(data)}).encode(), "application/x-www-form-urlencoded") == (
        200,
        {"message": "Ping request received"},
    )
    job = trainer.enqueue(IMAGES, data)
    assert str(uuid.UUID(job)) == job
    status, answer, before = trainer.wait(job, "mean")
    assert status == 200
    assert before, "there was no moment without scores: 400 was never seen"
    assert answer["scores"]["mean_reward"] == pytest.approx([image.mean() for image in IMAGES]), "weights are the client's business"
    assert answer["input_info"] == {"shape": [2, 16, 12, 3], "dtype": "torch.uint8", "min": f"{IMAGES.min():.3f}", "max": f"{IMAGES.max():.3f}"}
    assert answer["type"] == "mean"
    assert float(answer["duration"]) >= 0.4
    assert float(answer["decoded_duration"]) == 0.0
    assert trainer.pull(job, "mean") == (200, answer), "pulling again gives the same"
    assert trainer.pull(job, None) == (200, answer)
    assert trainer.pull(job, "ocr")[0] == 422, "a weight of 0 means that it was not asked for"


def make_pixels(latent: np.ndarray[Any, np.dtype[np.float32]], fps: float | None) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A decoder for latents [C, T, H, W]: the mean over channels, three times."""
    grey = np.clip(latent.mean(0), 0, 255).astype(np.uint8)
    return np.repeat(grey[..., None], 3, axis=-1)


def test_latents_as_the_video_trainers_send_them(rest: Serve, redis_url: str) -> None:
    trainer = Trainer(rest(fleet(redis_url, decoder=f"{__name__}:make_pixels")).base_url)
    latents = np.full((2, 16, 3, 4, 4), [[[[[10.0]]]], [[[[20.0]]]]], np.float16)
    job = trainer.enqueue(latents, {"prompts": ["a", "b"], "reward_fn": {"mean": 1.0}, "video_infos": [{"video_fps": 16.0}] * 2, "media_type": "latent"})
    status, answer, _ = trainer.wait(job, "mean")
    assert status == 200, answer
    assert answer["scores"]["mean_reward"] == [10.0, 20.0]
    assert answer["scores"]["frames"] == [3.0, 3.0]
    assert answer["input_info"]["video_infos"] == [{"video_fps": 16.0}] * 2


def test_names_of_cosmos_for_our_rewards(rest: Serve, redis_url: str) -> None:
    config = parse_fleet({"rewards": {"text": {"kind": "ocr", "mode": "cosmos"}, "other": {"kind": KIND}}, "redis_url": redis_url, "jobs": {"poll_s": 0.05}})
    trainer = Trainer(rest(config).base_url)
    blank = np.full((1, 48, 144, 3), 255, np.uint8)
    data = {"prompts": ['a sign "Hello World"'], "reward_fn": {"ocr": 1.0, "other": 1.0}, "media_type": "image"}
    job = trainer.enqueue(blank, data)
    _, answer, _ = trainer.wait(job, "ocr")
    assert answer["scores"] == {"ocr_reward": [pytest.approx(0.090909, abs=1e-6)]}, "the number in their README for an empty picture"
    assert trainer.wait(job, "other")[1]["scores"]["other_reward"] == [255.0]


def test_an_item_without_a_score_ends_the_polling_with_a_reason(rest: Serve, redis_url: str) -> None:
    trainer = Trainer(rest(fleet(redis_url)).base_url)
    job = trainer.enqueue(IMAGES, {"prompts": ["fine", "fail"], "reward_fn": {"mean": 1.0}, "media_type": "image"})
    status, answer, _ = trainer.wait(job, "mean")
    assert (status, answer["code"]) == (422, "items_failed")
    assert "scores" not in answer


def test_refusals(rest: Serve, redis_url: str) -> None:
    client = rest(fleet(redis_url, limits={"max_items": 4, "max_total_pixels": 500}))
    trainer = Trainer(client.base_url)
    assert trainer.pull(str(uuid.uuid4()), "mean")[0] == 404
    assert trainer.pull("not a uuid", "mean")[0] == 404

    def status(tensor: np.ndarray[Any, Any], **data: Any) -> int:
        buffer = io.BytesIO()
        np.save(buffer, tensor)
        line = {"prompts": ["a"] * len(tensor), "reward_fn": {"mean": 1.0}, "media_type": "image", **data}
        return trainer.post("/api/reward/enqueue", json.dumps(line).encode() + b"\n" + buffer.getvalue(), "application/octet-stream")[0]

    assert status(IMAGES[:, :4, :4], reward_fn={"hpsv3": 1.0}) == 404
    assert status(np.zeros((5, 4, 4, 3), np.uint8)) == 413
    assert status(np.zeros((2, 20, 20, 3), np.uint8)) == 413, "too many pixels"
    assert status(np.zeros((1, 16, 1, 4, 4), np.float16), media_type="latent") in (200, 422)
    plain = client.post("/v1/jobs", data={"prompt": "a"}, files={"file": ("a.npy", _npy(IMAGES[0, :4, :4]))}).json()["id"]
    assert trainer.pull(str(uuid.UUID(hex=plain)), "mean")[0] == 404, "not a job of these routes"


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_keys_are_checked(rest: Serve, redis_url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("trainer score trainer-secret-0123456789\n")
    keys.chmod(0o600)
    url = rest(fleet(redis_url, keys_file=str(keys))).base_url
    assert Trainer(url).pull(str(uuid.uuid4()), "mean")[0] == 401
    assert Trainer(url, "wrong").pull(str(uuid.uuid4()), "mean")[0] == 401
    trainer = Trainer(url, "trainer-secret-0123456789")
    job = trainer.enqueue(IMAGES, {"prompts": ["a", "b"], "reward_fn": {"mean": 1.0}, "media_type": "image"})
    assert trainer.wait(job, "mean")[0] == 200
