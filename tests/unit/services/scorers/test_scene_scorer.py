"""Scene statistics: by hand on tiny pictures, against a plain numpy computation on random ones, and what they detect."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.scorers.scene import CLIP, EMPTY_PICTURE, PICTURE, TOO_FEW_FRAMES, SceneScorer, clip_statistics, picture_statistics
from services.scorers.settings import SceneReward

pictures = hnp.arrays(np.uint8, st.tuples(st.integers(1, 12), st.integers(1, 12), st.just(3)))


def flat(r: int, g: int, b: int, size: int = 8) -> Image:
    return np.full((size, size, 3), (r, g, b), np.uint8)


def slow_statistics(image: Image) -> dict[str, float]:
    """The definitions written out, pixel by pixel where it is easier to trust."""
    pixels = [tuple(int(c) for c in p) for p in image.reshape(-1, 3)]
    luma = np.array([round((299 * r + 587 * g + 114 * b) / 1000) for r, g, b in pixels], float)
    rg, yb = np.array([r - g for r, g, _ in pixels], float), np.array([(r + g) / 2 - b for r, g, b in pixels], float)
    boxes = [(r // 32, g // 32, b // 32) for r, g, b in pixels]
    shares = [boxes.count(box) / len(boxes) for box in set(boxes)]
    return {
        "brightness": luma.mean() / 255,
        "dark_share": float((luma <= 25).mean()),
        "clipped_share": sum(max(p) <= 2 or min(p) >= 253 for p in pixels) / len(pixels),
        "contrast": luma.std() / 255,
        "colourfulness": math.hypot(rg.std(), yb.std()) + 0.3 * math.hypot(rg.mean(), yb.mean()),
        "colour_entropy": -sum(s * math.log2(s) for s in shares),
    }


@given(pictures)
def test_the_definitions(image: Image) -> None:
    found = picture_statistics(image)
    # Luma at exactly one half may round either way: one level of 255, or a pixel on the other side of "dark".
    level = {"brightness": 1.1 / 255, "contrast": 1.1 / 255, "dark_share": 1.0}
    for name, value in slow_statistics(image).items():
        assert found[name] == pytest.approx(value, abs=level.get(name, 1e-4)), name


def test_dark_is_luma_up_to_25() -> None:
    image = np.stack([flat(v, v, v, size=2) for v in (0, 25, 26, 200)])
    assert [picture_statistics(i)["dark_share"] for i in image] == [1, 1, 0, 0]


@given(pictures)
def test_ranges(image: Image) -> None:
    found = picture_statistics(image)
    assert tuple(found) == PICTURE
    assert all(0 <= found[name] <= 1 for name in ("brightness", "dark_share", "clipped_share", "edge_density"))
    assert 0 <= found["contrast"] <= 0.5 + 1e-9
    assert 0 <= found["colour_entropy"] <= 9
    assert found["sharpness"] >= 0


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    image = np.zeros((5, 5, 3), np.uint8)
    image[2, 2] = 100  # the Laplacian is -400 there, 100 at its four neighbours, 0 at the other 20
    assert picture_statistics(image)["sharpness"] == pytest.approx((400**2 + 4 * 100**2) / 25)


def test_flat_colours() -> None:
    grey, red = picture_statistics(flat(128, 128, 128)), picture_statistics(flat(255, 0, 0))
    assert grey["brightness"] == pytest.approx(128 / 255)
    assert [grey[n] for n in ("contrast", "colourfulness", "colour_entropy", "edge_density", "sharpness", "dark_share")] == [0] * 6
    assert red["colourfulness"] == pytest.approx(0.3 * math.hypot(255, 127.5))
    assert picture_statistics(flat(0, 0, 0))["clipped_share"] == picture_statistics(flat(255, 255, 255))["clipped_share"] == 1


def test_recorded_numbers_of_uniform_noise() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3), np.uint8)
    found = picture_statistics(noise)
    assert found["colour_entropy"] == pytest.approx(9.0, abs=0.01)
    assert found["edge_density"] == pytest.approx(0.37, abs=0.005)


def test_text_on_black_is_told_from_a_picture(draw_line: Callable[..., Image]) -> None:
    """The picture that an OCR reward alone drifts to."""
    hacked = picture_statistics(255 - draw_line("Open Late", px=12))
    y, x = np.mgrid[0:128, 0:128]
    scene = np.stack([128 + 90 * np.sin(x / 9), 90 + y / 2, 128 + 90 * np.cos((x + y) / 15)], -1).astype(np.uint8)
    natural = picture_statistics(scene)
    assert hacked["dark_share"] > 0.8 > 0.1 > natural["dark_share"]
    assert hacked["clipped_share"] > 0.8 > 0.05 > natural["clipped_share"]
    assert hacked["colour_entropy"] < 1.5 < 4 < natural["colour_entropy"]
    assert hacked["colourfulness"] == 0 < natural["colourfulness"]


def test_motion_is_the_mean_step() -> None:
    still, step = np.stack([flat(50, 50, 50)] * 4), np.stack([flat(v, v, v) for v in (0, 51, 0, 51)])
    assert clip_statistics(still)["motion"] == 0
    assert clip_statistics(step)["motion"] == pytest.approx(51 / 255)


def test_a_fade_does_not_flicker_and_an_alternation_does() -> None:
    fade, blink = np.stack([flat(v, v, v) for v in (0, 20, 40, 60)]), np.stack([flat(v, v, v) for v in (0, 51, 0, 51)])
    assert clip_statistics(fade)["flicker"] == pytest.approx(0, abs=1e-12)
    assert clip_statistics(blink)["flicker"] == pytest.approx(51 / 255)


def test_a_moving_picture_of_equal_brightness_moves_without_flicker() -> None:
    base = np.zeros((8, 8, 3), np.uint8)
    base[:, :4] = 255
    found = clip_statistics(np.stack([np.roll(base, k, axis=1) for k in range(4)]))
    assert found["motion"] == pytest.approx(2 / 8)
    assert found["flicker"] == 0


def test_a_clip_has_the_means_of_its_frames() -> None:
    frames = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    each = [picture_statistics(f) for f in frames]
    found = clip_statistics(frames)
    assert all(found[n] == pytest.approx(np.mean([s[n] for s in each])) for n in PICTURE)


def test_images_clips_and_failures_in_one_batch() -> None:
    scorer = SceneScorer(SceneReward(reward="contrast"))
    clip = np.random.default_rng(1).integers(0, 256, (3, 16, 16, 3), np.uint8)
    batch = [Media.image(clip[0]), Media(clip, fps=8), Media(clip[:2], fps=8), Media(clip[:, :0], fps=8)]
    image, video, short, empty = scorer.score([""] * 4, batch)
    assert isinstance(image, ItemScore)
    assert tuple(image.sub_scores) == PICTURE
    assert image.reward == image.sub_scores["contrast"]
    assert isinstance(video, ItemScore)
    assert tuple(video.sub_scores) == (*PICTURE, *CLIP)
    assert isinstance(short, ScoreFailure)
    assert short.code == TOO_FEW_FRAMES
    assert isinstance(empty, ScoreFailure)
    assert empty.code == EMPTY_PICTURE


def test_a_reward_of_clips_takes_clips_only() -> None:
    scorer = SceneScorer(SceneReward(reward="flicker"))
    scorer.self_test()
    assert scorer.info().media == ["video"]
    (image,) = scorer.score([""], [Media.image(flat(1, 2, 3))])
    assert isinstance(image, ScoreFailure)
