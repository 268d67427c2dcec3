"""A scorer whose right answer the test knows, with a speed of its choice."""

from __future__ import annotations

import time
from collections.abc import Sequence

from pydantic import Field

from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.base import Scorer
from services.scorers.settings import RewardSettings

KIND = "tests.integration.services.probe_scorers:Mean"


class MeanSettings(RewardSettings):
    """``delay_s`` per item stands for work."""

    delay_s: float = Field(default=0.0, ge=0)


class Mean(Scorer):
    """The mean of all pixels. The prompt 'fail' has no score; 'raise' breaks the scorer; 'busy' is worth a retry; 'say …' is read back."""

    Settings = MeanSettings
    name, media, reward, sub_scores = "mean", ("image", "video"), "mean", ("mean", "frames")
    revision = "mean-1"  # type: ignore[assignment]
    preprocessing = "none"  # type: ignore[assignment]

    def __init__(self, settings: MeanSettings) -> None:
        self._delay_s = settings.delay_s

    def score(self, prompts: Sequence[str], media: Sequence[Media]) -> list[ItemScore | ScoreFailure]:
        """See ``Scorer.score``."""
        time.sleep(self._delay_s * len(prompts))
        return [self._one(prompt, item) for prompt, item in zip(prompts, media, strict=True)]

    def _one(self, prompt: str, item: Media) -> ItemScore | ScoreFailure:
        if prompt == "raise":
            raise RuntimeError("/secret/path is broken")
        if prompt in ("fail", "busy"):
            return ScoreFailure(prompt, "as asked", retryable=prompt == "busy")
        mean = float(item.frames.mean())
        return ItemScore(mean, {"mean": mean, "frames": float(len(item.frames))}, prompt.removeprefix("say ") if prompt.startswith("say ") else None)

    def self_test(self) -> None:
        """Nothing can be wrong."""
