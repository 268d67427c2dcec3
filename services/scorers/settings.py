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


class JpegReward(RewardSettings):
    """How large the picture is as a JPEG file."""

    kind: Literal["jpeg"] = Field(default="jpeg", description="Size as a JPEG file.")
    reward: Literal["compressibility", "incompressibility"] = Field(default="compressibility", description="Sub-score that is the reward.")
    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality; the references use 95.")


class SceneReward(RewardSettings):
    """Plain statistics of a picture or clip."""

    kind: Literal["scene"] = Field(default="scene", description="Plain statistics of a picture or clip.")
    reward: Literal[
        "brightness", "dark_share", "clipped_share", "contrast", "colourfulness", "colour_entropy", "edge_density", "sharpness", "motion", "flicker"
    ] = Field(default="colour_entropy", description="Sub-score that is the reward; motion and flicker are for clips only.")
