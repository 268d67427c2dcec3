"""What every reward model is to the fleet: a named, versioned function from media and prompts to scores.

Lifecycle: construct (loads weights) → ``self_test()`` (a known answer must come out) → ``score()`` for ever.
Invariant: ``score`` gives one ``ItemScore`` or ``ScoreFailure`` per item, in order; an item's result does not
depend on the other items of the batch; a failure of one item never spoils another.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Literal

from services.client.base import Image, ItemScore, ScoreFailure
from services.schemas import ModelInfo


class ScorerUnfit(RuntimeError):
    """A scorer's self-test did not give its known answer; the replica must not serve."""


class Scorer(ABC):
    """A reward model. Called from one thread at a time."""

    name: ClassVar[str]
    media: ClassVar[tuple[Literal["image"], ...]]
    reward: ClassVar[str]  # the sub-score that is the reward
    sub_scores: ClassVar[tuple[str, ...]]

    @property
    @abstractmethod
    def revision(self) -> str:
        """Engine, weights and preprocessing: equal revisions give equal numbers."""

    @abstractmethod
    def score(self, prompts: Sequence[str], images: Sequence[Image]) -> list[ItemScore | ScoreFailure]:
        """Score ``images`` (uint8 RGB [H, W, 3], sizes may differ), one per prompt."""

    @abstractmethod
    def self_test(self) -> None:
        """Raise ``ScorerUnfit`` unless a known input gives its known score."""

    def info(self) -> ModelInfo:
        """The description served by ``GET /v1/models``."""
        return ModelInfo(
            name=self.name,
            revision=self.revision,
            media=list(self.media),
            reward=self.reward,
            sub_scores=list(self.sub_scores),
        )
