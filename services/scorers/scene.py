"""Plain statistics of a picture or clip: no weights, a few milliseconds. Rewards for tests, detectors of reward hacking.

With Y = luma 0…255 (0.299 R + 0.587 G + 0.114 B, rounded), of all pixels of a picture:

``brightness``      mean of Y / 255                                                          0…1
``dark_share``      share with Y ≤ 25                                                        0…1
``clipped_share``   share whose channels are all ≤ 2 or all ≥ 253                            0…1
``contrast``        standard deviation of Y / 255                                            0…0.5
``colourfulness``   Hasler & Süsstrunk 2003: √(σ²rg + σ²yb) + 0.3 √(μ²rg + μ²yb),
                    rg = R - G, yb = (R + G)/2 - B                                           0…~200
``colour_entropy``  entropy of the histogram of 8x8x8 equal colour boxes, bits               0…9
``edge_density``    share that Canny (100, 200, 3x3 Sobel, L1 magnitude) marks as edge       0…1
``sharpness``       variance of the 4-neighbour Laplacian of Y                               0…~10⁵

A clip gets the means over its frames, and over its neighbouring frames two more, which images do not have:

``motion``          mean over pixels and steps of |Y(t) - Y(t-1)| / 255                      0…1
``flicker``         mean over t of |b(t) - (b(t-1) + b(t+1))/2|, b = brightness of a frame   0…1
                    (a steady fade has none)

Text on black, the picture an OCR reward drifts to, has dark_share and clipped_share near 1 and a colour_entropy near 0.
Compare a run with its own start, not with fixed limits.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray

from services.contract import ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.settings import SceneReward

PICTURE = ("brightness", "dark_share", "clipped_share", "contrast", "colourfulness", "colour_entropy", "edge_density", "sharpness")
CLIP = ("motion", "flicker")
TOO_FEW_FRAMES = "too_few_frames"
EMPTY_PICTURE = "image_invalid"
CLIP_FRAMES = 3  # flicker compares a frame with both neighbours

_DARK, _BLACK, _WHITE = 25, 2, 253
_CANNY = (100, 200)


class SceneScorer(Scorer):
    """Brightness, colour, edges and sharpness; motion and flicker of clips."""

    name = "scene"
    sub_scores = (*PICTURE, *CLIP)
    needs_prompt = False

    def __init__(self, config: SceneReward) -> None:
        cv2.setNumThreads(1)  # process-wide; replicas are the unit of parallelism
        self.reward = config.reward
        self.media = ("video",) if config.reward in CLIP else ("image", "video")

    @property
    def revision(self) -> str:
        return f"scene-1;{self.reward};opencv-{cv2.__version__}"

    @property
    def preprocessing(self) -> str:
        return "none"

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``; prompts are not looked at."""
        return [self._one(item) for item in media]

    def self_test(self) -> None:
        """Uniform noise has nearly the full 9 bits of colour entropy, a flat picture none, and no edges."""
        noise, flat = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), np.full((64, 64, 3), 128, np.uint8)
        busy, calm = picture_statistics(noise), picture_statistics(flat)
        if not (busy["colour_entropy"] > 8.5 and calm["colour_entropy"] == calm["edge_density"] == 0 and abs(calm["brightness"] - 128 / 255) < 1e-9):
            raise ScorerUnfit(f"{self.revision}: noise gave {busy}, a flat picture {calm}")

    def _one(self, item: Media) -> ItemScore | ScoreFailure:
        if item.frames.size == 0:
            return ScoreFailure(EMPTY_PICTURE, "the picture has no pixels")
        if item.is_video and len(item.frames) < CLIP_FRAMES:
            return ScoreFailure(TOO_FEW_FRAMES, f"the clip has {len(item.frames)} frames, flicker needs {CLIP_FRAMES}")
        if not item.is_video and self.reward in CLIP:
            return ScoreFailure(TOO_FEW_FRAMES, f"an image has no {self.reward}")
        scores = clip_statistics(item.frames) if item.is_video else picture_statistics(item.pixels)
        return ItemScore(scores[self.reward], scores)


def clip_statistics(frames: NDArray[np.uint8]) -> dict[str, float]:
    """All statistics of a clip, uint8 RGB [T, H, W, 3] with T ≥ 3."""
    each = [picture_statistics(frame) for frame in frames]
    lumas = [luma(frame) for frame in frames]
    b = np.array([s["brightness"] for s in each])
    return {
        **{name: float(np.mean([s[name] for s in each])) for name in PICTURE},
        "motion": float(np.mean([cv2.absdiff(a, c).mean() for a, c in itertools.pairwise(lumas)])) / 255,
        "flicker": float(np.abs(b[1:-1] - (b[:-2] + b[2:]) / 2).mean()),
    }


def picture_statistics(image: Image) -> dict[str, float]:
    """The statistics of one picture, uint8 RGB [H, W, 3], at least one pixel."""
    y = luma(image)
    light = np.bincount(y.ravel(), minlength=256) / y.size
    level = np.arange(256) / 255
    brightness = float(light @ level)
    return {
        "brightness": brightness,
        "dark_share": float(light[: _DARK + 1].sum()),
        "clipped_share": float(((image <= _BLACK).all(-1) | (image >= _WHITE).all(-1)).mean()),
        "contrast": float(np.sqrt(light @ (level - brightness) ** 2)),
        "colourfulness": _colourfulness(image),
        "colour_entropy": _colour_entropy(image),
        "edge_density": float((cv2.Canny(y, *_CANNY) > 0).mean()),
        "sharpness": float(cv2.Laplacian(y, cv2.CV_64F).var()),
    }


def luma(image: Image) -> NDArray[np.uint8]:
    """Rec. 601 luma of uint8 RGB [H, W, 3], rounded to uint8 [H, W]."""
    return np.asarray(cv2.cvtColor(np.ascontiguousarray(image), cv2.COLOR_RGB2GRAY), np.uint8)


def _colourfulness(image: Image) -> float:
    r, g, b = (image[..., c].astype(np.float32) for c in range(3))
    rg, yb = r - g, (r + g) / 2 - b
    spread = np.hypot(rg.std(dtype=np.float64), yb.std(dtype=np.float64))
    return float(spread + 0.3 * np.hypot(rg.mean(dtype=np.float64), yb.mean(dtype=np.float64)))


def _colour_entropy(image: Image) -> float:
    r, g, b = (image[..., c].astype(np.uint16) >> 5 for c in range(3))
    counts = np.bincount((r << 6 | g << 3 | b).ravel(), minlength=512)
    p = counts[counts > 0] / counts.sum()
    return float(max(0.0, -(p * np.log2(p)).sum()))
