"""The bodies of cosmos-rl's trainers: what they mean here, and what is refused before anything is allocated."""

from __future__ import annotations

import io
import json
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.errors import ProblemError
from services.jobs.cosmos import as_call, chosen, describe, parse_enqueue, scores_of
from services.limits import LimitsConfig
from services.media.base import Media
from services.rest.schemas import RewardAnswer, Score, ScoreError

KINDS = {"text": "ocr", "jpeg": "jpeg"}
LIMITS = LimitsConfig()
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), dtype=np.uint8)


def body(array: np.ndarray[Any, Any], **line: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    data = {"prompts": ["a", "b"][: len(array)], "reward_fn": {"ocr": 1.0}, **line}
    return json.dumps(data).encode("utf-8") + b"\n" + buffer.getvalue()


def media(data: bytes, rewards: list[str] | None = None) -> list[Media]:
    call = as_call(*parse_enqueue(data, LIMITS), rewards or ["text"], LIMITS)
    return [item for plan in call.plans for item in (plan.decode or list)()]


def refused(data: bytes, limits: LimitsConfig = LIMITS) -> tuple[int, str]:
    with pytest.raises(ProblemError) as error:
        as_call(*parse_enqueue(data, limits), ["text"], limits)
    return error.value.status, error.value.code


def test_images() -> None:
    items = media(body(IMAGES, media_type="image"))
    assert [item.fps for item in items] == [None, None]
    assert np.array_equal(np.concatenate([item.frames for item in items]), IMAGES)


def test_video_is_channels_first_with_its_own_frame_rate() -> None:
    clips = np.random.default_rng(1).integers(0, 256, (2, 3, 5, 8, 6), dtype=np.uint8)
    items = media(body(clips, media_type="video", video_infos=[{"video_fps": 24.0, "extra": 1}, {}]))
    assert [item.fps for item in items] == [24.0, 16.0]
    assert np.array_equal(items[1].frames, clips[1].transpose(1, 2, 3, 0))


def test_latents_of_bytes_are_bfloat16() -> None:
    values = np.array([1.0, -2.5, 3.140625, 0.0], np.float32)
    raw = (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8).reshape(1, 1, 1, 1, 8)
    line, array = parse_enqueue(body(raw), LIMITS)
    (latent,) = as_call(line, array, ["text"], LIMITS).latents
    assert latent.values.shape == (1, 1, 1, 4)
    assert np.array_equal(latent.values.ravel(), values)
    assert describe(line, array) == {"shape": [1, 1, 1, 1, 4], "dtype": "torch.bfloat16", "min": "-2.500", "max": "3.141"}


def test_latents_of_floats_are_taken_as_they_are() -> None:
    values = np.random.default_rng(2).normal(size=(2, 4, 1, 3, 3)).astype(np.float16)
    call = as_call(*parse_enqueue(body(values, media_type="latent", video_infos=[{"video_fps": 8}] * 2), LIMITS), ["text"], LIMITS)
    assert [latent.fps for latent in call.latents] == [8, 8]
    assert np.array_equal(np.stack([latent.values for latent in call.latents]), values.astype(np.float32))


def test_input_info_as_the_original_gives_it() -> None:
    info = describe(*parse_enqueue(body(IMAGES, media_type="image"), LIMITS))
    assert info == {"shape": [2, 8, 6, 3], "dtype": "torch.uint8", "min": f"{IMAGES.min():.3f}", "max": f"{IMAGES.max():.3f}"}


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("raise SystemExit('a pickle was opened')",)


def test_what_is_refused() -> None:
    assert refused(b'{"prompts": []') == (422, "invalid_request")
    assert refused(b"\n") == (422, "invalid_request")
    assert refused(b"[" * 500 + b"\n") == (413, "json_too_large")
    assert refused(body(IMAGES, media_type="image")[:-1]) == (422, "invalid_request")
    assert refused(body(IMAGES, media_type="image", prompts=["a"])) == (422, "invalid_request")
    assert refused(body(IMAGES, media_type="sound")) == (422, "invalid_request")
    assert refused(body(IMAGES.astype(np.float32), media_type="image")) == (422, "invalid_request")
    assert refused(body(IMAGES[..., :2], media_type="image")) == (422, "invalid_request")
    assert refused(body(np.zeros((2, 1, 1, 1, 3), np.uint8))) == (422, "invalid_request"), "an odd number of bytes is no bfloat16"
    line = body(IMAGES, media_type="image").partition(b"\n")[0] + b"\n"
    assert refused(line + pickle.dumps(Bomb())) == (415, "unsupported_media_type")
    assert refused(line + b"PK\x03\x04torch") == (415, "unsupported_media_type")
    assert refused(body(IMAGES, media_type="image", prompts=["a" * 5000, "b"])) == (413, "prompt_too_long")
    assert refused(body(IMAGES, media_type="image"), LimitsConfig(max_items=1)) == (413, "too_many_items")
    assert refused(body(np.zeros((2, 1, 1, 9, 9), np.float32)), LimitsConfig(max_latent_values=100)) == (413, "latents_too_large")


def test_an_object_array_is_not_opened() -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True)
    line = body(IMAGES, media_type="image").partition(b"\n")[0] + b"\n"
    assert refused(line + buffer.getvalue()) == (422, "invalid_request")


@given(st.binary(max_size=300), st.sampled_from(["image", "video", "latent", None]))
def test_any_bytes_give_a_problem_of_the_client(tail: bytes, media_type: str | None) -> None:
    line = json.dumps({"prompts": ["a"], "reward_fn": {"ocr": 1}, "media_type": media_type}).encode() + b"\n"
    for data in (tail, line + tail, line + b"\x93NUMPY" + tail, line + b"\x93NUMPY\x01\x00" + tail):
        status = 422
        try:
            as_call(*parse_enqueue(data, LIMITS), ["text"], LIMITS)
        except ProblemError as error:
            status = error.status
        assert 400 <= status < 500


def test_names_of_rewards() -> None:
    assert chosen({"ocr": 1.0, "jpeg": 0.5, "hpsv2": 0.0, "dance_grpo": -1}, KINDS) == {"ocr": "text", "jpeg": "jpeg"}
    with pytest.raises(ProblemError, match="no reward 'pickscore'"):
        chosen({"pickscore": 1.0}, KINDS)
    with pytest.raises(ProblemError, match="no weight is above 0"):
        chosen({"ocr": 0.0}, KINDS)


def answer(*results: Score) -> RewardAnswer:
    return RewardAnswer(revision="r", preprocessing_hash="p", results=list(results))


def test_names_of_scores() -> None:
    two = answer(
        Score(reward=3.0, scores={"vq": 1.0, "mq": 1.5, "ta": 0.5, "overall": 3.0}), Score(reward=6.0, scores={"vq": 2, "mq": 3, "ta": 1, "overall": 6})
    )
    assert scores_of("dance_grpo", "videoalign", two) == {"vq_reward": [1, 2], "mq_reward": [1.5, 3], "ta_reward": [0.5, 1], "overall_reward": [3, 6]}
    read = answer(Score(reward=0.5, scores={"flow_grpo": 0.5, "strict": 0.25}))
    assert scores_of("ocr", "ocr", read) == {"ocr_reward": [0.5]}
    assert scores_of("jpeg", "jpeg", answer(Score(reward=-1.0, scores={"size": 2.0}))) == {"jpeg_reward": [-1.0], "size": [2.0]}


def test_an_item_without_a_score_is_no_number() -> None:
    mixed = answer(Score(reward=1.0, scores={"flow_grpo": 1.0}), Score(error=ScoreError(code="no_quoted_text", message="no quotes")))
    with pytest.raises(ProblemError, match="1 of 2 items have no score; item 1: no_quoted_text: no quotes"):
        scores_of("ocr", "ocr", mixed)
