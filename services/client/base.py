"""What a trainer sees of a reward: one protocol, one score type, one failure type.

Lifecycle: ``check()`` once at start, ``score_all()`` for every group, ``close()`` at the end.
Invariant: every reward gives exactly one result per item, in order. A result is a finite ``ItemScore`` or a
``ScoreFailure`` that says why this item has no score. When the service as a whole does not answer before the
deadline, ``RewardUnavailable`` is raised; nothing is ever turned into a number.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.media.base import Media


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


UNAVAILABLE = "unavailable"  # code of the failures of a reward that gave no answer at all

Batch = NDArray[np.uint8] | Sequence[Media]


class RewardClient(Protocol):
    """A source of rewards. Implementations are thread-safe and may be used from several threads."""

    def info(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """What the rewards ``names`` are: revision, sub-scores, media. Raises ``RewardUnavailable``."""
        ...

    def check(self, names: Sequence[str]) -> dict[str, ModelInfo]:
        """``info``, after each of them has scored one blank item for real. Raises ``RewardUnavailable``."""
        ...

    def score_all(
        self, names: Sequence[str], prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None
    ) -> dict[str, list[ItemScore | ScoreFailure]]:
        """Score B items against B ``prompts`` with all rewards ``names`` at once, within ``timeout_s`` seconds.

        ``media`` is uint8 RGB [B, H, W, 3] (images), [B, T, H, W, 3] (clips, with ``fps``), or a sequence of ``Media``.
        Each reward has its own failures. One that is unavailable as a whole has the failure ``unavailable`` for every item, where
        others answered; when none did, ``RewardUnavailable`` is raised.
        """
        ...

    def score(self, model: str, prompts: Sequence[str], media: Batch, timeout_s: float, fps: float | None = None) -> list[ItemScore | ScoreFailure]:
        """``score_all`` with one reward."""
        ...

    def close(self) -> None:
        """Release connections."""
        ...


def as_media(prompts: Sequence[str], media: Batch, fps: float | None = None) -> list[Media]:
    """A batch in any accepted form as one ``Media`` per prompt. Raises ``ValueError`` for what no reward can score."""
    if not isinstance(media, np.ndarray):
        items = list(media)
    elif media.dtype != np.uint8 or media.ndim not in (4, 5) or media.shape[-1] != 3:
        raise ValueError(f"media must be uint8 [B, H, W, 3] or [B, T, H, W, 3], got {media.dtype} {list(media.shape)}")
    elif (media.ndim == 5) != (fps is not None):
        raise ValueError(f"media {list(media.shape)} with fps {fps}: clips [B, T, H, W, 3] need fps, images [B, H, W, 3] have none")
    else:
        items = [Media(m, fps) if media.ndim == 5 else Media.image(m) for m in media]
    if len(prompts) != len(items):
        raise ValueError(f"{len(prompts)} prompts for {len(items)} items")
    return items


def probe(info: ModelInfo) -> tuple[list[str], list[Media]]:
    """The start-up test request: one blank image or clip with a quoted target; any finite score will do."""
    image, clip = np.full((1, 16, 48, 3), 255, np.uint8), np.full((8, 64, 64, 3), 255, np.uint8)
    return ['a sign that says "0"'], [Media(image) if "image" in info.media else Media(clip, fps=8.0)]
