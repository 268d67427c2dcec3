"""What every reward model is to the fleet: a named, versioned function from media and prompts to scores.

Lifecycle: construct (loads weights) → ``self_test()`` (a known answer must come out) → ``score()`` for ever.
Invariant: ``score`` gives one ``ItemScore`` or ``ScoreFailure`` per item, in order; an item's result does not
depend on the other items of the batch; a failure of one item never spoils another.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

from services.contract import FrameSpec, ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media


class ScorerUnfit(RuntimeError):
    """A scorer's self-test did not give its known answer; the replica must not serve."""


class Scorer(ABC):
    """A reward model. Called from one thread at a time."""

    name: str  # what kind of reward it is; a fleet may run it under another name
    media: tuple[Literal["image", "video"], ...]
    reward: str  # the sub-score that is the reward
    sub_scores: tuple[str, ...]
    needs_prompt: bool = True

    @property
    @abstractmethod
    def revision(self) -> str:
        """Engine, weights and preprocessing: equal revisions give equal numbers."""

    @property
    @abstractmethod
    def preprocessing(self) -> str:
        """What happens to the media before the model sees them, short and stable; answers carry its hash."""

    @property
    def frame_spec(self) -> FrameSpec:
        """Which frames of a clip it looks at; ``services.media.frames.take`` carries it out."""
        return FrameSpec(kind="all" if "video" in self.media else "image")

    def cost(self, media: Media) -> int:
        """What one item costs in a batch; batches are cut by a budget of it. By default its pixels, T * H * W."""
        frames, height, width, _ = media.frames.shape
        return frames * height * width

    @abstractmethod
    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """Score ``media`` (kinds as declared, sizes may differ), one per prompt."""

    @abstractmethod
    def self_test(self) -> None:
        """Raise ``ScorerUnfit`` unless a known input gives its known score."""

    def info(self, name: str | None = None) -> ModelInfo:
        """The description served by ``GET /v1/models``, under ``name`` where the fleet calls it otherwise."""
        return ModelInfo(
            name=name or self.name,
            revision=self.revision,
            preprocessing=self.preprocessing,
            preprocessing_hash=hashlib.sha256(self.preprocessing.encode()).hexdigest()[:12],
            media=list(self.media),
            reward=self.reward,
            sub_scores=list(self.sub_scores),
            needs_prompt=self.needs_prompt,
            frame_spec=self.frame_spec,
        )
