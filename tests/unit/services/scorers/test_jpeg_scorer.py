"""JPEG sizes against recorded numbers, and what cannot be a JPEG file."""

from __future__ import annotations

import numpy as np
import pytest

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.jpeg import ENCODE_FAILED, JpegScorer
from services.scorers.settings import JpegReward

X, Y = np.meshgrid(np.arange(256), np.arange(256))
PICTURES = {
    "black": np.zeros((256, 256, 3), np.uint8),
    "grey": np.full((256, 256, 3), 128, np.uint8),
    "ramp": np.stack([X, Y, (X + Y) // 2], -1).astype(np.uint8),
    "noise": np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8),
}


@pytest.mark.parametrize(("name", "kilobytes"), [("black", 1.651), ("grey", 1.649), ("ramp", 6.643), ("noise", 77.481)])
def test_acceptance_7_recorded_sizes(name: str, kilobytes: float) -> None:
    (result,) = JpegScorer(JpegReward()).score([""], [Media.image(PICTURES[name])])
    assert isinstance(result, ItemScore)
    assert result.sub_scores["incompressibility"] == kilobytes
    assert result.reward == result.sub_scores["compressibility"] == -kilobytes / 500
    assert result.sub_scores["bits_per_pixel"] == kilobytes * 8000 / 65536


def test_the_reward_is_the_chosen_direction() -> None:
    scorer = JpegScorer(JpegReward(reward="incompressibility"))
    (result,) = scorer.score([""], [Media.image(PICTURES["ramp"])])
    assert isinstance(result, ItemScore)
    assert result.reward == 6.643
    assert scorer.info().reward == "incompressibility"


def test_a_clip_is_the_mean_of_its_frames() -> None:
    clip = Media(np.stack([PICTURES["black"], PICTURES["noise"]]), fps=8)
    (result,) = JpegScorer(JpegReward()).score([""], [clip])
    assert isinstance(result, ItemScore)
    assert result.sub_scores["incompressibility"] == pytest.approx((1.651 + 77.481) / 2)


@pytest.mark.parametrize("shape", [(0, 8, 3), (1, 65_536, 3)])
def test_what_cannot_be_a_file_is_a_typed_failure(shape: tuple[int, ...]) -> None:
    wrong, right = np.zeros(shape, np.uint8), PICTURES["black"]
    failed, scored = JpegScorer(JpegReward()).score(["", ""], [Media.image(wrong), Media.image(right)])
    assert isinstance(failed, ScoreFailure)
    assert failed.code == ENCODE_FAILED
    assert isinstance(scored, ItemScore)


def test_quality_and_encoder_are_in_the_revision() -> None:
    one, other = JpegScorer(JpegReward()), JpegScorer(JpegReward(quality=75))
    assert one.revision != other.revision
    assert "pillow-" in one.revision
    one.self_test()


def test_a_view_with_strides_scores_like_its_copy() -> None:
    view = PICTURES["ramp"][:, ::-1]
    a, b = JpegScorer(JpegReward()).score(["", ""], [Media.image(view), Media.image(np.ascontiguousarray(view))])
    assert a == b
