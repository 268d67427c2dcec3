"""The wire contract of the reward service: what ``/v1/*`` accepts and answers.

Invariant: one item carries either finite scores or an error, never both and never a sentinel number.
Pydantic only, so that trainers and third parties can import it without Ray or torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Finite = Annotated[float, Field(allow_inf_nan=False)]


class StrictModel(BaseModel):
    """Base of every schema and setting: unknown keys are errors, values do not change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ScoreItem(StrictModel):
    """One image to score, for the JSON form of a request."""

    prompt: str = Field(description="Prompt the image was made from; the OCR reward reads its quoted text.")
    image: str = Field(description="Base64 of one PNG, JPEG, WebP or npy (uint8 [H, W, 3] RGB) file.")


class ScoreRequest(StrictModel):
    """Body of ``POST /v1/score`` as ``application/json``."""

    model: str = Field(default="ocr", description="Name of the reward model, as listed by /v1/models.")
    items: list[ScoreItem] = Field(min_length=1, description="Images with their prompts.")


class ScoreError(StrictModel):
    """Why one item has no score."""

    code: str = Field(description="Stable machine-readable code, such as 'no_quoted_text'.")
    message: str = Field(description="One line for a person.")
    retryable: bool = Field(default=False, description="Whether the same item may succeed later.")


class Score(StrictModel):
    """Result of one item: ``reward`` and ``scores``, or ``error``."""

    reward: Finite | None = Field(default=None, description="The number to train on.")
    scores: dict[str, Finite] | None = Field(default=None, description="All sub-scores by name.")
    text: str | None = Field(default=None, description="What the scorer read, where it reads text.")
    error: ScoreError | None = Field(default=None, description="Why there is no score.")

    @model_validator(mode="after")
    def _scores_or_error(self) -> Self:
        scored = self.reward is not None and self.scores is not None
        partly = self.reward is not None or self.scores is not None
        if scored == (self.error is not None) or partly != scored:
            raise ValueError("an item carries either reward and scores, or an error")
        return self


class ScoreResponse(StrictModel):
    """Answer of ``POST /v1/score``; ``results`` are in the order of the request."""

    model: str = Field(description="Name of the reward model that answered.")
    revision: str = Field(description="Scorer, engine, weights and preprocessing that made the numbers.")
    preprocessing_hash: str = Field(default="", description="Short hash of what was done to the media first.")
    request_id: str = Field(default="", description="Repeats the header X-Request-ID.")
    results: list[Score] = Field(description="One result per item.")


class FrameSpec(StrictModel):
    """Which frames of a clip a reward looks at, so that clients and decoders handle only those.

    ``services.frames`` carries it out. Sizes (``max_frame_pixels``, ``multiple_of``, ``interpolation``) tell what the
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


class ModelList(StrictModel):
    """Answer of ``GET /v1/models``."""

    models: list[ModelInfo] = Field(description="Reward models of this fleet.")


class ModelHealth(StrictModel):
    """How one reward model is doing."""

    name: str = Field(description="Name to use in requests.")
    status: Literal["ready", "starting", "unhealthy"] = Field(description="Whether it can score now.")
    replicas: int = Field(default=0, ge=0, description="Running replicas.")
    queued: int = Field(default=0, ge=0, description="Requests that wait.")
    ongoing: int = Field(default=0, ge=0, description="Requests that are being scored.")
    p50_s: Finite | None = Field(default=None, description="Median latency of recent calls in seconds; null before the first.")
    p99_s: Finite | None = Field(default=None, description="99th percentile of the same.")
    message: str | None = Field(default=None, description="Why it is not ready.")


class Health(StrictModel):
    """Answer of ``GET /healthz``."""

    status: Literal["ok"] = Field(default="ok", description="The ingress is alive.")


class Problem(StrictModel):
    """RFC 9457 problem details, sent as ``application/problem+json``."""

    type: str = Field(default="about:blank", description="Problem type; 'about:blank' means see the code.")
    title: str = Field(description="Reason phrase of the status.")
    status: int = Field(description="HTTP status.")
    code: str = Field(description="Stable machine-readable code.")
    detail: str = Field(description="What was wrong with this request, and the limit it hit.")
