"""What a reward says about itself and about one item; the words that every room of the services shares.

Invariant: an item has finite scores or a typed failure, never a sentinel number. Pydantic and plain data classes only, so that
trainers and third parties can import it without Ray, torch, numpy or FastAPI.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]


class StrictModel(BaseModel):
    """Base of every schema and setting: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class FrameSpec(StrictModel):
    """Which frames of a clip a reward looks at, so that clients and decoders handle only those.

    ``services.media.frames`` carries it out. Sizes (``max_frame_pixels``, ``multiple_of``, ``interpolation``) tell what the
    scorer does to a frame; clients send frames as they are.
    """

    kind: Literal["image", "all", "uniform", "stride"] = Field(
        default="all",
        description="image: still images only; all: every frame; uniform: evenly spaced from first to last; stride: every stride-th frame from the first.",
    )
    fps: float | None = Field(default=None, gt=0, description="uniform: frames per second of clip time; null takes max_frames.")
    stride: int | None = Field(default=None, ge=1, description="stride: distance between frames.")
    min_frames: int | None = Field(default=None, ge=1, description="uniform: fewest frames, where the clip has that many.")
    max_frames: int | None = Field(default=None, ge=1, description="Most frames the reward looks at.")
    frames_multiple_of: int = Field(default=1, ge=1, description="uniform: the number of frames is a multiple of this.")
    max_frame_pixels: int | None = Field(default=None, ge=1, description="The scorer shrinks larger frames to this area (height x width).")
    multiple_of: int | None = Field(default=None, ge=1, description="The scorer makes height and width multiples of this.")
    interpolation: str | None = Field(default=None, description="How the scorer resizes.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.kind == "stride" and self.stride is None:
            raise ValueError("kind 'stride' needs stride")
        if self.kind == "uniform" and self.fps is None and self.max_frames is None:
            raise ValueError("kind 'uniform' needs fps or max_frames")
        return self


class ModelInfo(StrictModel):
    """What a reward model takes and gives."""

    name: str = Field(description="Name to use in requests.")
    revision: str = Field(description="Scorer, engine, weights and preprocessing; log it with every reward.")
    preprocessing: str = Field(default="", description="What is done to the media before the model sees them.")
    preprocessing_hash: str = Field(default="", description="Short hash of the preprocessing; repeated in every answer.")
    media: list[Literal["image", "video"]] = Field(description="Accepted media.")
    reward: str = Field(description="Name of the sub-score that is the reward.")
    sub_scores: list[str] = Field(description="Names of all sub-scores.")
    needs_prompt: bool = Field(default=True, description="Whether the score depends on the prompt.")
    frame_spec: FrameSpec = Field(default_factory=FrameSpec, description="Which frames it looks at.")


class ModelHealth(StrictModel):
    """How one reward model is doing."""

    name: str = Field(description="Name to use in requests.")
    status: Literal["ready", "starting", "unhealthy"] = Field(description="Whether it can score now.")
    replicas: int | None = Field(default=0, ge=0, description="Running replicas; null when Serve does not say.")
    queued: int = Field(default=0, ge=0, description="Requests that wait.")
    ongoing: int = Field(default=0, ge=0, description="Requests that are being scored.")
    p50_s: Finite | None = Field(default=None, description="Median latency of recent calls in seconds; null before the first.")
    p99_s: Finite | None = Field(default=None, description="99th percentile of the same.")
    message: str | None = Field(default=None, description="Why it is not ready.")


@dataclass(frozen=True)
class ItemScore:
    """Scores of one item. ``reward`` is the number to train on; all values are finite."""

    reward: float
    sub_scores: dict[str, float]
    text: str | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(v) for v in (self.reward, *self.sub_scores.values())):
            raise ValueError(f"scores must be finite: reward {self.reward}, sub-scores {self.sub_scores}")


@dataclass(frozen=True)
class ScoreFailure:
    """Why one item has no score. ``code`` is stable; ``retryable`` says whether trying again can help."""

    code: str
    message: str
    retryable: bool = False
