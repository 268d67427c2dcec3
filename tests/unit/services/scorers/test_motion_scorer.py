"""Motion against a prompt: the formula by hand, shifts of textures, and what a clip of the glyph world scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.motion import DIRECTIONS, NO_DIRECTION, SEVERAL_DIRECTIONS, MotionScorer, direction_of, motion_scores, shifts
from services.scorers.scene import EMPTY_PICTURE, TOO_FEW_FRAMES
from services.scorers.settings import MotionReward

SCORER = MotionScorer(MotionReward())
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


def square(path: list[tuple[int, int]], size: int = 48) -> NDArray[np.uint8]:
    """A clip of a textured square whose corner goes along `path`, in pixels to the right and down from (14, 14)."""
    texture = np.random.default_rng(0).integers(120, 256, (16, 16, 3), np.uint8)
    clip = np.full((len(path), size, size, 3), 30, np.uint8)
    for frame, (x, y) in zip(clip, path, strict=True):
        frame[14 + y : 30 + y, 14 + x : 30 + x] = texture
    return clip


def scored(prompt: str, clip: NDArray[np.uint8]) -> dict[str, float]:
    (found,) = SCORER.score([prompt], [Media(clip, 8.0)])
    assert isinstance(found, ItemScore)
    assert found.reward == found.sub_scores["motion"]
    return found.sub_scores


def line(direction: str, *places: int) -> list[tuple[int, int]]:
    x, y = DIRECTIONS[direction]
    return [(int(x) * place, int(y) * place) for place in places]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_steady_motion_scores_near_one_in_its_direction_and_nothing_in_others(direction: str) -> None:
    clip = square(line(direction, 0, 2, 4, 6))
    right = scored(f"a square that goes {direction}", clip)
    assert right["motion"] > 0.95
    assert right["speed"] == pytest.approx(2, abs=0.1)
    against = scored(f"a square that goes {OPPOSITE[direction]}", clip)
    assert against["motion"] == against["direction"] == 0
    assert against["speed"] == pytest.approx(-2, abs=0.1)
    for other in set(DIRECTIONS) - {direction, OPPOSITE[direction]}:
        assert scored(f"a square that goes {other}", clip)["motion"] < 0.05


def test_an_unsteady_motion_scores_what_the_formula_says() -> None:
    """The worked example of the module."""
    found = motion_scores(np.array([[3.0, 0], [0, 0], [3, 0]]), DIRECTIONS["right"])
    assert found["direction"] == pytest.approx(2 / 3)
    assert found["steadiness"] == pytest.approx(1 - 2**0.5 / 2)
    assert found["motion"] == pytest.approx(found["direction"] * found["steadiness"])
    assert found["speed"] == pytest.approx(2)
    seen = scored("to the right", square(line("right", 0, 3, 3, 6)))
    assert seen["motion"] == pytest.approx(found["motion"], abs=0.03)


def test_a_slanted_motion_has_the_cosine_of_its_angle() -> None:
    found = motion_scores(np.array([[3.0, 4.0]] * 3), DIRECTIONS["down"])
    assert found["direction"] == pytest.approx(0.8)
    assert found["steadiness"] == 1


@pytest.mark.parametrize("path", [[(0, 0)] * 4, [(0, 0), (4, 0), (0, 0), (4, 0), (0, 0)]], ids=["still", "to and fro"])
def test_a_clip_that_gets_nowhere_scores_nothing(path: list[tuple[int, int]]) -> None:
    assert scored("to the right", square(path))["motion"] == pytest.approx(0, abs=0.01)


def test_a_picture_without_structure_does_not_shift() -> None:
    flat = np.full((4, 16, 16, 3), 90, np.uint8)
    assert scored("left", flat) == {"motion": 0, "direction": 0, "steadiness": 0, "speed": 0}
    assert np.array_equal(shifts(flat), np.zeros((3, 2)))


def test_noise_that_changes_from_frame_to_frame_scores_next_to_nothing() -> None:
    rng = np.random.default_rng(0)
    found = [scored("up", rng.integers(0, 256, (5, 16, 40, 3), np.uint8))["motion"] for _ in range(50)]
    assert np.mean(found) < 0.05


def test_a_veil_of_noise_does_not_hide_the_motion() -> None:
    clip = square(line("left", 0, 2, 4, 6))
    veiled = np.clip(clip + np.random.default_rng(0).normal(0, 20, clip.shape), 0, 255).astype(np.uint8)
    assert scored("left", veiled)["motion"] > 0.8


@given(hnp.arrays(np.float64, st.tuples(st.integers(2, 8), st.just(2)), elements=st.floats(-50, 50)), st.sampled_from(sorted(DIRECTIONS)))
def test_ranges(steps: NDArray[np.float64], direction: str) -> None:
    found = motion_scores(steps, DIRECTIONS[direction])
    assert all(0 <= found[name] <= 1 + 1e-12 for name in ("motion", "direction", "steadiness"))
    assert found["motion"] <= min(found["direction"], found["steadiness"]) + 1e-12
    against = motion_scores(-steps, DIRECTIONS[direction])
    assert against["steadiness"] == pytest.approx(found["steadiness"])
    assert against["speed"] == pytest.approx(-found["speed"])


@pytest.mark.parametrize(
    ("prompt", "direction"),
    [
        ('the number "407" moving left', "left"),
        ("UPWARDS it goes", "up"),
        ("rightward drift", "right"),
        ('the word "left" moving down', "down"),
        ("up, up, up", "up"),
    ],
)
def test_the_direction_that_a_prompt_names(prompt: str, direction: str) -> None:
    assert direction_of(prompt) == DIRECTIONS[direction]


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ('the number "407"', NO_DIRECTION),
        ('the word "left"', NO_DIRECTION),
        ("a cup upon leftovers", NO_DIRECTION),
        ("up and then left", SEVERAL_DIRECTIONS),
        ("", NO_DIRECTION),
    ],
)
def test_a_prompt_without_one_direction_is_a_failure_and_no_number(prompt: str, code: str) -> None:
    (found,) = SCORER.score([prompt], [Media(square(line("left", 0, 2, 4)), 8.0)])
    assert isinstance(found, ScoreFailure)
    assert found.code == code


def test_failures_leave_their_neighbours_alone() -> None:
    clip = square(line("left", 0, 2, 4))
    media = [Media(clip, 8.0), Media(clip[:2], 8.0), Media(clip[:, :0], 8.0), Media.image(clip[0])]
    good, short, empty, image = SCORER.score(["left"] * 4, media)
    assert isinstance(good, ItemScore)
    assert good.reward > 0.9
    assert [f.code for f in (short, empty, image) if isinstance(f, ScoreFailure)] == [TOO_FEW_FRAMES, EMPTY_PICTURE, TOO_FEW_FRAMES]


def test_what_it_says_of_itself() -> None:
    SCORER.self_test()
    info = SCORER.info()
    assert info.media == ["video"]
    assert info.needs_prompt
    assert info.frame_spec.kind == "all"
