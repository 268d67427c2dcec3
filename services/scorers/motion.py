"""Does a clip move the way its prompt says? Measured on the pixels, without weights.

The prompt names one direction outside its quoted text: left, right, up or down (also leftward, rightwards, …). Between neighbouring
frames the shift d(t) of the picture, in pixels to the right and down, is the peak of their phase correlation (Kuglin & Hines 1975) on
luma, to a fraction of a pixel (OpenCV's `phaseCorrelate`, with its Hann window). With u the unit vector of the direction and m the
mean of d(t):

``direction``    mean over t of max(0, d(t)·u / |d(t)|), the cosine of the angle; a step below ``STILL`` pixels counts 0      0…1
``steadiness``   max(0, 1 - √mean|d(t) - m|² / |m|): 1 when all steps are equal, 0 when they differ as much as they move,
                 or when |m| is below ``STILL``                                                               0…1
``motion``       direction · steadiness, the reward                                                                          0…1
``speed``        m·u, pixels a frame in the direction, negative against it                                                   any

Worked example: a number that goes right by 2, 2 and 2 pixels is at 1 when asked to go right, at 0 when asked to go left or up. One
that goes right by 3, 0 and 3 has direction 2/3 and steadiness 1 - √2 / 2: 0.20.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.scene import EMPTY_PICTURE, TOO_FEW_FRAMES, luma
from services.scorers.settings import MotionReward

DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
"""Unit vectors to the right and down."""
NO_DIRECTION = "no_direction"
SEVERAL_DIRECTIONS = "several_directions"
FRAMES = 3
"""Fewer frames have one step, which is always steady."""
SIDE = 8
STILL = 0.25
FLAT = 1.0
"""Standard deviation of luma, of 255, below which a frame has nothing whose shift could be seen."""

_WORD = re.compile(rf"\b({'|'.join(DIRECTIONS)})(?:wards?)?\b")


class MotionScorer(Scorer):
    """Direction and steadiness of a clip's motion against its prompt."""

    name = "motion"
    media = ("video",)
    reward = "motion"
    sub_scores = ("motion", "direction", "steadiness", "speed")

    def __init__(self, config: MotionReward) -> None:
        cv2.setNumThreads(1)  # process-wide; replicas are the unit of parallelism

    @property
    def revision(self) -> str:
        return f"motion-1;still-{STILL:g};flat-{FLAT:g};opencv-{cv2.__version__}"

    @property
    def preprocessing(self) -> str:
        return "none"

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``."""
        return [_one(prompt, item) for prompt, item in zip(prompts, media, strict=True)]

    def self_test(self) -> None:
        """A square that goes right is at 1 when asked to go right and at 0 when asked to go left; a prompt without direction fails."""
        clip = np.full((4, 32, 32, 3), 40, np.uint8)
        for i, frame in enumerate(clip):
            frame[10:20, 6 + 2 * i : 16 + 2 * i] = 200
        right, left, none = self.score(["go right", "go left", "go"], [Media(clip, 8.0)] * 3)
        if not (isinstance(right, ItemScore) and right.reward > 0.95 and isinstance(left, ItemScore) and left.reward == 0 and isinstance(none, ScoreFailure)):
            raise ScorerUnfit(f"{self.revision}: a square that goes right scored {right} for right, {left} for left, {none} for none")


def direction_of(prompt: str) -> tuple[float, float] | ScoreFailure:
    """The unit vector of the one direction that a prompt names outside double quotes, or why it has none."""
    words = {match[1] for match in _WORD.finditer(" ".join(prompt.split('"')[::2]).lower())}
    if len(words) == 1:
        return DIRECTIONS[words.pop()]
    if not words:
        return ScoreFailure(NO_DIRECTION, f"the prompt names no direction ({', '.join(DIRECTIONS)}) outside its quoted text")
    return ScoreFailure(SEVERAL_DIRECTIONS, f"the prompt names several directions: {', '.join(sorted(words))}")


def shifts(frames: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Shifts between neighbours of uint8 RGB frames [T, H, W, 3], in pixels to the right and down: [T - 1, 2]; from or to a flat frame, 0."""
    lumas = [luma(frame).astype(np.float32) for frame in frames]
    window = cv2.createHanningWindow(lumas[0].shape[::-1], cv2.CV_32F)
    pairs = list(itertools.pairwise(lumas))
    seen = [min(a.std(), b.std()) >= FLAT for a, b in pairs]
    found = [cv2.phaseCorrelate(a - a.mean(), b - b.mean(), window)[0] if ok else (0.0, 0.0) for (a, b), ok in zip(pairs, seen, strict=True)]
    return np.array(found, np.float64)


def motion_scores(steps: NDArray[np.float64], towards: tuple[float, float]) -> dict[str, float]:
    """The scores of shifts [T - 1, 2] against a unit vector."""
    along, lengths, mean = steps @ np.array(towards), np.linalg.norm(steps, axis=1), steps.mean(0)
    moving = lengths >= STILL
    direction = float(np.where(moving, np.maximum(along, 0) / np.where(moving, lengths, 1), 0).mean())
    length = float(np.linalg.norm(mean))
    spread = float(np.sqrt(((steps - mean) ** 2).sum(1).mean()))
    steadiness = max(0.0, 1 - spread / length) if length >= STILL else 0.0
    return {"motion": direction * steadiness, "direction": direction, "steadiness": steadiness, "speed": float(along.mean())}


def _one(prompt: str, item: Media) -> ItemScore | ScoreFailure:
    towards = direction_of(prompt)
    if isinstance(towards, ScoreFailure):
        return towards
    _, height, width, _ = item.frames.shape
    if min(height, width) < SIDE:
        return ScoreFailure(EMPTY_PICTURE, f"frames of {width}x{height} pixels are too small to see a shift; {SIDE} a side are needed")
    if not item.is_video or len(item.frames) < FRAMES:
        return ScoreFailure(TOO_FEW_FRAMES, f"the clip has {len(item.frames)} frames, steadiness needs {FRAMES}")
    scores = motion_scores(shifts(item.frames), towards)
    return ItemScore(scores["motion"], scores)
