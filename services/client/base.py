"""What a trainer sees of a reward: one protocol, one score type, one failure type.

Lifecycle: ``check()`` once at start, ``score()`` for every group, ``close()`` at the end.
Invariant: ``score`` returns exactly one result per image, in order. A result is a finite ``ItemScore`` or a
``ScoreFailure`` that says why this image has no score. When the service as a whole does not answer before the
deadline, ``score`` raises ``RewardUnavailable``; nothing is ever turned into a number.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.schemas import ModelInfo

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class ItemScore:
    """Scores of one image. ``reward`` is the number to train on; all values are finite."""

    reward: float
    sub_scores: dict[str, float]
    text: str | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.reward, *self.sub_scores.values())):
            raise ValueError(f"scores must be finite: reward {self.reward}, sub-scores {self.sub_scores}")


@dataclass(frozen=True)
class ScoreFailure:
    """Why one image has no score. ``code`` is stable; ``retryable`` says whether trying again can help."""

    code: str
    message: str
    retryable: bool = False


class RewardError(Exception):
    """Base of everything the reward clients raise."""


class RewardUnavailable(RewardError):
    """The service did not give an answer before the deadline, or refused the request for good.

    ``status`` is the last HTTP status, None when nothing answered (or the path is not HTTP).
    """

    def __init__(self, where: str, what: str, advice: str, status: int | None = None) -> None:
        super().__init__(f"reward service {where}: {what}. {advice}")
        self.where, self.what, self.advice, self.status = where, what, advice, status

    def __reduce__(self) -> tuple[type[RewardUnavailable], tuple[str, str, str, int | None]]:
        return type(self), (self.where, self.what, self.advice, self.status)


class RewardClient(Protocol):
    """A source of rewards. Implementations are thread-safe and may be used from several threads."""

    def score(self, model: str, prompts: Sequence[str], images: Image, timeout_s: float) -> list[ItemScore | ScoreFailure]:
        """Score uint8 RGB ``images`` [B, H, W, 3] against B ``prompts`` within ``timeout_s`` seconds."""
        ...

    def check(self) -> ModelInfo:
        """Score one blank image for real and return what answered; raises ``RewardUnavailable``."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


def require_batch(prompts: Sequence[str], images: Image) -> None:
    """Refuse what no reward can score, before anything is sent. Raises ``ValueError``."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    if len(prompts) != len(images):
        raise ValueError(f"{len(prompts)} prompts for {len(images)} images")


def probe() -> tuple[list[str], Image]:
    """The start-up test request: one blank image with a quoted target; any finite score will do."""
    return ['a sign that says "0"'], np.full((1, 16, 48, 3), 255, np.uint8)
