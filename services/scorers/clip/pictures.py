"""What the rewards on a pre-trained image model have in common: clips as frames, one failure per item, the self-test.

A subclass turns pictures and token ids into sub-scores; this class picks frames, encodes each prompt of a batch once
(the members of a group share theirs), and averages over the frames of a clip. An item's result does not depend on its
company beyond the rounding of the precision in use.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from services.contract import FrameSpec, ItemScore, ScoreFailure
from services.media.base import Image, Media
from services.media.frames import take
from services.scorers.base import Scorer, ScorerUnfit
from services.scorers.clip.preparation import Preparation
from services.scorers.settings import TowerReward

EMPTY_PICTURE = "image_invalid"
NOT_FINITE = "not_finite"
# How far an item's score alone and in a batch may lie apart in the self-test.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.05}


class PictureScorer(Scorer):
    """A reward that looks at single pictures, through a vision model of fixed input size."""

    media = ("image", "video")

    def __init__(self, settings: TowerReward, preparation: Preparation, identity: str) -> None:
        self._settings, self._preparation, self._identity = settings, preparation, identity

    @property
    def revision(self) -> str:
        s = self._settings
        libraries = f"torch-{torch.__version__};transformers-{version('transformers')}"
        return f"{self.name}-1;{self.reward};weights-{self._identity};{s.dtype};frames-{s.frames};{self.preprocessing};{libraries}"

    @property
    def preprocessing(self) -> str:
        return str(self._preparation)

    @property
    def frame_spec(self) -> FrameSpec:
        side = self._preparation.size
        return FrameSpec(kind="uniform", max_frames=self._settings.frames, max_frame_pixels=side * side, multiple_of=side, interpolation="bicubic")

    def cost(self, media: Media) -> int:
        """Pixels after the preparation: what the vision model's work grows with."""
        frames = min(self._settings.frames, len(media.frames)) if media.is_video and not media.selected else len(media.frames)
        return frames * self._preparation.size**2

    @abstractmethod
    def tokens(self, prompt: str) -> list[int] | ScoreFailure:
        """Token ids of a prompt, or why it is refused."""

    @abstractmethod
    def judge(self, images: Sequence[Image], prompts: Sequence[tuple[int, ...]]) -> Mapping[str, Sequence[float]]:
        """Every sub-score of B pictures, each with the token ids of its prompt."""

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``. Failures: ``prompt_refused``, ``prompt_invalid``, ``image_invalid``, ``not_finite``."""
        ready = [self._ready(prompt, item) for prompt, item in zip(prompts, media, strict=True)]
        pictures = [(ids, frame) for item in ready if not isinstance(item, ScoreFailure) for ids, frame in item]
        found = self._in_batches(pictures)
        results: list[ItemScore | ScoreFailure] = []
        start = 0
        for item in ready:
            if isinstance(item, ScoreFailure):
                results.append(item)
                continue
            results.append(self._mean({name: values[start : start + len(item)] for name, values in found.items()}))
            start += len(item)
        return results

    def self_test(self) -> None:
        """Finite scores that tell two pictures (and two prompts) apart and are the same alone and in a batch.

        There is no public picture with a known score for every checkpoint, so none is asked for.
        """
        noise, ramp = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8), np.zeros((64, 96, 3), np.uint8)
        ramp[..., 0] = np.linspace(0, 255, 96).astype(np.uint8)
        cases = [("a red wall", noise), ("a red wall", ramp), ("a long walk through a quiet town in the rain", ramp)]
        together = self._numbers([prompt for prompt, _ in cases], [image for _, image in cases])
        alone = [self._numbers([prompt], [image])[0] for prompt, image in cases]
        worst = max(abs(a[name] - b[name]) / max(1.0, abs(b[name])) for a, b in zip(together, alone, strict=True) for name in self.sub_scores)
        if worst > TOLERANCE[self._settings.dtype]:
            raise ScorerUnfit(f"{self.name}: scores change by {worst:g} in company of other pictures")
        if together[0] == together[1] or (self.needs_prompt and together[1] == together[2]):
            raise ScorerUnfit(f"{self.name}: different pictures or prompts score alike: {together}")

    def _numbers(self, prompts: Sequence[str], images: Sequence[Image]) -> list[dict[str, float]]:
        results = self.score(prompts, [Media.image(image) for image in images])
        numbers = [r.sub_scores for r in results if isinstance(r, ItemScore)]
        if len(numbers) != len(results):
            raise ScorerUnfit(f"{self.name}: plain pictures gave {results}")
        return numbers

    def _ready(self, prompt: str, item: Media) -> list[tuple[tuple[int, ...], Image]] | ScoreFailure:
        """The item's pictures, each with the ids of its prompt."""
        if item.frames.size == 0:
            return ScoreFailure(EMPTY_PICTURE, "the picture has no pixels")
        ids = self.tokens(prompt) if self.needs_prompt else []
        if isinstance(ids, ScoreFailure):
            return ids
        return [(tuple(ids), frame) for frame in take(self.frame_spec, item).frames]

    def _in_batches(self, pictures: Sequence[tuple[tuple[int, ...], Image]]) -> dict[str, list[float]]:
        """Every sub-score of all pictures, computed at most ``batch_cost`` prepared pixels at a time."""
        step = max(1, self._settings.batch_cost // self._preparation.size**2)
        found: dict[str, list[float]] = {name: [] for name in self.sub_scores}
        for start in range(0, len(pictures), step):
            part = pictures[start : start + step]
            for name, values in self.judge([frame for _, frame in part], [ids for ids, _ in part]).items():
                found[name].extend(values)
        return found

    def _mean(self, each: Mapping[str, Sequence[float]]) -> ItemScore | ScoreFailure:
        scores = {name: sum(values) / len(values) for name, values in each.items()}
        if not all(map(math.isfinite, scores.values())):
            return ScoreFailure(NOT_FINITE, "the model's output is not finite")
        return ItemScore(scores[self.reward], scores)


def unique(prompts: Sequence[tuple[int, ...]]) -> tuple[list[list[int]], Any]:
    """The distinct rows of ``prompts``, and for each of them the index of its distinct row."""
    index = {ids: i for i, ids in enumerate(dict.fromkeys(prompts))}
    return [list(ids) for ids in index], torch.tensor([index[ids] for ids in prompts])
