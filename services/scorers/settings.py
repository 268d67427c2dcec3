"""Settings of the built-in scorers: one class per ``kind`` of a ``rewards.yaml`` entry (pydantic only).

An entry holds a scorer's own fields beside those of its deployment; ``services.scorers.registry`` finds the class.
"""

from __future__ import annotations

from pathlib import Path
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


class TowerReward(RewardSettings):
    """What the rewards on a pre-trained image model have in common."""

    path: Path = Field(description="Local folder of the model: config.json, safetensors. Nothing is downloaded.")
    processor: Path | None = Field(default=None, description="Folder of tokenizer.json and preprocessor_config.json; null: path.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(default="float32", description="Precision of weights and activations.")
    frames: int = Field(default=8, ge=1, le=1024, description="Evenly spaced frames of a clip; its scores are their means.")


class ClipScoreReward(TowerReward):
    """How well a picture fits its prompt, by a CLIP model."""

    kind: Literal["clipscore"] = Field(default="clipscore", description="CLIP's cosine between picture and prompt.")
    reward: Literal["clipscore", "cosine", "flow_grpo"] = Field(default="clipscore", description="Sub-score that is the reward.")


class PickScoreReward(TowerReward):
    """Human preference, by PickScore's CLIP-H."""

    kind: Literal["pickscore"] = Field(default="pickscore", description="PickScore_v1.")
    reward: Literal["pickscore", "logit", "cosine"] = Field(default="pickscore", description="Sub-score that is the reward.")


class Hpsv2Reward(TowerReward):
    """Human preference, by an HPSv2 checkpoint in open_clip's layout."""

    kind: Literal["hpsv2"] = Field(default="hpsv2", description="Human Preference Score v2 or v2.1.")
    path: Path = Field(description="Local folder of the CLIP-H model it was tuned from: config.json; its weights are not needed.")
    checkpoint: Path = Field(description="HPS_v2_compressed.pt or HPS_v2.1_compressed.pt.")


class AestheticReward(TowerReward):
    """How much people like a picture, by LAION's predictor on CLIP L/14."""

    kind: Literal["aesthetic"] = Field(default="aesthetic", description="LAION aesthetic predictor v2.")
    head: Path = Field(description="sac+logos+ava1-l14-linearMSE.pth, or its tensors as safetensors.")


class ImageRewardReward(TowerReward):
    """Human preference, by ImageReward's BLIP."""

    kind: Literal["imagereward"] = Field(default="imagereward", description="ImageReward v1.0.")
    path: Path = Field(description="Local folder with ImageReward.pt and med_config.json.")
    processor: Path | None = Field(default=None, description="Folder with the tokenizer.json of bert-base-uncased; null: path.")


class HttpReward(RewardSettings):
    """A reward of another service with the same REST contract, as one of ours."""

    kind: Literal["http"] = Field(default="http", description="A reward that another service computes.")
    url: str = Field(pattern=r"^https?://[^@/]+", description="Base URL of the other service, without /v1 and without a password in it.")
    model: str = Field(description="Its name there.")
    api_key_env: str | None = Field(default=None, description="Environment variable of the replicas that holds its bearer key.")
