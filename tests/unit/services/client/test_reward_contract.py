"""Schemas, settings, score values, and which imports they may bring."""

from __future__ import annotations

import math
import pickle
import subprocess
import sys

import numpy as np
import pytest
from pydantic import ValidationError

from services.client.base import RewardError, RewardUnavailable, as_media
from services.client.connect import connect
from services.client.rest import RestRewardClient
from services.config import FleetConfig
from services.contract import ItemScore
from services.media.base import Media
from services.rest.schemas import Score, ScoreError, ScoreRequest


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"reward": 1.0},
        {"scores": {"a": 1.0}},
        {"reward": 1.0, "scores": {"a": 1.0}, "error": {"code": "c", "message": "m"}},
        {"scores": {}, "error": {"code": "c", "message": "m"}},
        {"reward": math.nan, "scores": {}},
        {"reward": 1.0, "scores": {"a": math.inf}},
        {"reward": 1.0, "scores": {}, "extra": 1},
    ],
)
def test_an_item_is_scores_or_an_error(body: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Score.model_validate(body)


def test_valid_items() -> None:
    assert Score(reward=0.5, scores={"a": 0.5}).error is None
    assert Score(error=ScoreError(code="c", message="m")).reward is None


def test_requests_are_strict() -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        ScoreRequest.model_validate({"items": [{"prompt": "p", "image": ""}], "modle": "ocr"})
    with pytest.raises(ValidationError, match="too_short"):
        ScoreRequest.model_validate({"items": []})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_scores_are_finite(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        ItemScore(bad, {})
    with pytest.raises(ValueError, match="finite"):
        ItemScore(0.0, {"strict": bad})


def test_batches_are_checked_before_they_are_sent() -> None:
    image = np.zeros((2, 16, 48, 3), np.uint8)
    assert [m.is_video for m in as_media(["a", "b"], image)] == [False, False]
    assert [m.frames.shape for m in as_media(["a"], image[None], fps=8)] == [(2, 16, 48, 3)]
    with pytest.raises(ValueError, match="1 prompts for 2 items"):
        as_media(["a"], image)
    with pytest.raises(ValueError, match="need fps"):
        as_media(["a"], image[None])
    with pytest.raises(ValueError, match="have none"):
        as_media(["a", "b"], image, fps=8)
    for wrong in (image[0], image.astype(np.float32), image[..., :1]):
        with pytest.raises(ValueError, match="uint8"):
            as_media(["a", "b"], wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "dtype", "fps"),
    [
        ((2, 4, 4, 3), np.uint8, None),
        ((4, 4, 3), np.uint8, None),
        ((1, 4, 4, 3), np.float32, None),
        ((2, 4, 4, 3), np.uint8, 0.0),
        ((2, 4, 4, 3), np.uint8, math.nan),
    ],
)
def test_media_is_one_image_or_one_clip(shape: tuple[int, ...], dtype: type, fps: float | None) -> None:
    with pytest.raises(ValueError, match=r"frames|fps"):
        Media(np.zeros(shape, dtype), fps)  # type: ignore[arg-type]


def test_unavailable_survives_a_process_boundary() -> None:
    error = RewardUnavailable("http://x", "answered HTTP 500", "Look into the log.", 500)
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error)
    assert again.status == 500


def test_connect_picks_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    config = FleetConfig(url="http://127.0.0.1:1", api_key_env="REWARD_TEST_KEY")
    with pytest.raises(RewardError, match=r"fleet.api_key_env names REWARD_TEST_KEY"):
        connect(config, "rewards")
    monkeypatch.setenv("REWARD_TEST_KEY", "k")
    client = connect(config, "rewards")
    assert isinstance(client, RestRewardClient)
    client.close()


@pytest.mark.parametrize(
    "module",
    [
        "services.rest.schemas",
        "services.config",
        "services.client.base",
        "services.client.rest",
        "services.client.aio",
        "services.limits",
        "services.media.frames",
        "services.client.connect",
    ],
)
def test_light_modules_bring_no_heavy_imports(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('torch', 'ray', 'redis', 'fastapi') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
