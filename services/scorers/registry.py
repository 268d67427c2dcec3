"""Which scorers this fleet can start, by name. The one place a new reward model is added."""

from __future__ import annotations

from services.config import RewardConfig
from services.scorers.base import Scorer


def make_scorer(model: str, config: RewardConfig) -> Scorer:
    """Load the scorer ``model``. Imports are local: a process pays only for the engine it runs."""
    if model == "ocr":
        from services.scorers.ocr import OcrScorer

        return OcrScorer(config.ocr)
    raise ValueError(f"unknown reward model {model!r}")
