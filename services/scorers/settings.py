"""Settings of the built-in scorers: one class per ``kind`` of a ``rewards.yaml`` entry (pydantic only).

An entry holds a scorer's own fields beside those of its deployment; ``services.scorers.registry`` finds the class.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from services.contract import StrictModel


class Replicas(StrictModel):
    """Autoscaling bounds of one reward; ``replicas: 2`` in a file is short for ``{min: 2, max: 2}``."""

    min: int = Field(default=1, ge=1, le=1024, description="Replicas that always run.")
    max: int = Field(default=1, ge=1, le=1024, description="Replicas under load.")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max < self.min:
            raise ValueError(f"max ({self.max}) is below min ({self.min})")
        return self


class DeploymentConfig(StrictModel):
    """How a reward runs: one Serve deployment. Scorer settings inherit this or stand beside it in the same entry."""

    replicas: Replicas = Field(default_factory=Replicas, description="Autoscaling bounds; a number fixes both.")
    device: Literal["cpu", "cuda"] = Field(default="cpu", description="Where the scorer computes; cuda reserves gpus.")
    cpus: float = Field(default=1.0, ge=0, le=1024, description="Ray CPUs reserved per replica.")
    gpus: float = Field(default=0.0, ge=0, le=64, description="GPUs reserved per replica; a fraction shares one.")
    batch_cost: int = Field(default=4_000_000, ge=1, description="Largest batch in the scorer's own unit of cost, pixels unless it says otherwise.")
    batch_items: int = Field(default=32, ge=1, le=4096, description="Most items of a batch.")
    batch_wait_s: float = Field(default=0.002, ge=0, le=1, description="How long a replica waits for more requests to fill a batch.")
    timeout_s: float = Field(default=30.0, gt=0, le=3600, description="Deadline of one request at this reward, repeats included.")
    max_queued: int = Field(default=256, ge=1, description="Requests that may wait for a replica; more are refused (503).")
    target_ongoing: float = Field(default=4.0, gt=0, description="Requests per replica, waiting ones included, above which replicas are added.")

    @field_validator("replicas", mode="before")
    @classmethod
    def _short_replicas(cls, value: Any) -> Any:
        return {"min": value, "max": value} if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _device_and_gpus(self) -> Self:
        if self.device == "cuda" and self.gpus == 0:
            raise ValueError("device cuda needs gpus above 0 (a fraction shares one GPU)")
        if self.device == "cpu" and self.gpus > 0:
            raise ValueError("gpus is set but device is cpu; set device: cuda")
        if self.gpus > 1 and self.gpus != int(self.gpus):
            raise ValueError(f"gpus is {self.gpus:g}: above 1 it must be a whole number")
        return self


class RewardSettings(DeploymentConfig):
    """One entry of ``rewards:``. A scorer of one's own inherits this, adds its fields, and names it ``Settings``."""

    kind: str = Field(description="Built-in kind such as 'ocr', or 'module:Class' of a scorer of one's own.")


class OcrReward(RewardSettings):
    """How much of the quoted text of the prompt can be read in the picture."""

    kind: Literal["ocr"] = Field(default="ocr", description="OCR against the quoted text of the prompt.")
    mode: Literal["flow_grpo", "cosmos", "strict"] = Field(
        default="flow_grpo",
        description="Sub-score that is the reward: flow_grpo and cosmos forgive text beyond the target, strict does not. All are always computed.",
    )
    reading: Literal["recognition", "detection"] = Field(
        default="recognition",
        description="recognition: the image is one line of text; detection: find the lines first (needs letters of about 20 px or more after the upscale).",
    )
    upscale: int = Field(default=3, ge=1, le=16, description="Integer bicubic upscale before reading; 16x48 px becomes 48x144.")
    min_confidence: float = Field(
        default=0.5,
        ge=0.0,
        le=1.0,
        description="Lines read with less confidence than this count as not read.",
    )
    lines_per_call: int = Field(default=8, ge=1, le=256, description="Lines per engine call; bounds memory, not speed, on one thread.")
    detection_side_limit: int = Field(default=960, ge=32, le=4096, description="Longest side the detector sees; larger images are shrunk.")
    frame_stride: int = Field(default=4, ge=1, le=1024, description="Every how many-th frame of a clip is read, from the first.")


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


class MotionReward(RewardSettings):
    """Whether a clip moves the way its prompt says."""

    kind: Literal["motion"] = Field(default="motion", description="Direction and steadiness of a clip's motion against its prompt.")


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
