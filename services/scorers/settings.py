"""Settings of the built-in scorers: one class per ``kind`` of a ``rewards.yaml`` entry (pydantic only).

An entry holds a scorer's own fields beside those of its deployment; ``services.scorers.registry`` finds the class.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from services.config import DeploymentConfig, OcrConfig


class RewardSettings(DeploymentConfig):
    """One entry of ``rewards:``. A scorer of one's own inherits this, adds its fields, and names it ``Settings``."""

    kind: str = Field(description="Built-in kind such as 'ocr', or 'module:Class' of a scorer of one's own.")


class OcrReward(OcrConfig, RewardSettings):
    """How much of the quoted text of the prompt can be read in the picture."""

    kind: Literal["ocr"] = Field(default="ocr", description="OCR against the quoted text of the prompt.")
