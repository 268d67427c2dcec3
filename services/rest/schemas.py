"""The wire contract of the reward service: what ``/v1/*`` accepts and answers.

Invariant: one item carries either finite scores or an error, never both and never a sentinel number.
Pydantic only, so that trainers and third parties can import it without Ray or torch.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from services.contract import Finite, ModelHealth, ModelInfo, StrictModel

Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_-]+$")]
Base64 = Annotated[str, Field(min_length=4, pattern=r"^[A-Za-z0-9+/]+={0,2}$", json_schema_extra={"format": "byte", "contentEncoding": "base64"})]
Fps = Annotated[float, Field(gt=0, le=1000, allow_inf_nan=False)]
TimeoutS = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


def _span(value: tuple[float, float]) -> tuple[float, float]:
    if value[0] > value[1]:
        raise ValueError(f"the lower bound {value[0]:g} is above the upper bound {value[1]:g}")
    return value


Span = Annotated[tuple[Finite, Finite], AfterValidator(_span)]


class Combine(StrictModel):
    """How several scores of an item become one total: clip each part, weight it, add up, clip the sum.

    A part is ``reward`` (that reward's own number), ``reward.sub_score``, or ``reward.a+b`` (a sum of sub-scores).
    """

    weights: dict[str, Finite] = Field(min_length=1, max_length=64, description="Weight of each part; names are reward, reward.sub_score or reward.a+b.")
    clip: dict[str, Span] = Field(default_factory=dict, description="Bounds [low, high] of a part before it is weighted.")
    total_clip: Span | None = Field(default=None, description="Bounds [low, high] of the total.")

    @model_validator(mode="after")
    def _clips_parts(self) -> Self:
        unknown = sorted(self.clip.keys() - self.weights.keys())
        if unknown:
            raise ValueError(f"clip names {unknown[0][:64]!r}, which has no weight")
        return self


class ScoreOptions(StrictModel):
    """What to score with; the same in every form of a request."""

    model: Name | None = Field(default=None, description="The one reward to score with; null takes the only one of this fleet.")
    rewards: list[Name] | None = Field(
        default=None, min_length=1, description="Several rewards at once; the answer then lists them by name.", json_schema_extra={"uniqueItems": True}
    )
    combine: Combine | None = Field(default=None, description="Also give one total per item; needs rewards.")
    timeout_s: TimeoutS | None = Field(default=None, description="Deadline in seconds; X-Timeout-S does the same.")

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.model is not None and self.rewards is not None:
            raise ValueError("give model (one reward) or rewards (several), not both")
        if self.rewards is not None and len(set(self.rewards)) != len(self.rewards):
            raise ValueError("rewards names one twice")
        if self.combine is not None and self.rewards is None:
            raise ValueError("combine needs rewards")
        return self


class ScoreItem(StrictModel):
    """One image or clip to score, for the JSON form of a request: exactly one of ``image`` and ``video``."""

    model_config = ConfigDict(extra="forbid", frozen=True, json_schema_extra={"oneOf": [{"required": ["image"]}, {"required": ["video"]}]})

    prompt: str = Field(default="", description="Prompt the item was made from; the OCR reward reads its quoted text.")
    image: Base64 | None = Field(default=None, description="Base64 of one PNG, JPEG, WebP or npy (uint8 [H, W, 3] RGB) file.")
    video: Base64 | None = Field(default=None, description="Base64 of one mp4 or npy (uint8 [T, H, W, 3] RGB) file.")
    fps: Fps | None = Field(default=None, description="Frames per second of an npy clip; an mp4 file knows its own.")
    selected: bool = Field(default=False, description="The frames are already those of the reward's frame spec.")

    @model_validator(mode="after")
    def _one_medium(self) -> Self:
        if (self.image is None) == (self.video is None):
            raise ValueError("give exactly one of image and video")
        if self.image is not None and (self.fps is not None or self.selected):
            raise ValueError("fps and selected belong to a video")
        return self


class ScoreRequest(ScoreOptions):
    """Body of ``POST /v1/score`` as ``application/json``."""

    items: list[ScoreItem] = Field(min_length=1, description="Images and clips with their prompts.")


class TensorItem(StrictModel):
    """One item of the safetensors form; its pixels are a tensor of the same body."""

    prompt: str = Field(default="", description="Prompt the item was made from.")
    fps: Fps | None = Field(default=None, description="Frames per second; null for an image.")
    selected: bool = Field(default=False, description="The frames are already those of the reward's frame spec.")


class TensorRequest(ScoreOptions):
    """The string ``request`` in the metadata of a safetensors body, as JSON.

    Item i is tensor ``media.{i}`` (uint8 RGB [H, W, 3] or [T, H, W, 3]) or row i of tensor ``media`` (one dimension more);
    ``latents.{i}`` or ``latents`` (F16, BF16 or F32) instead where the fleet has a decoder.
    """

    items: list[TensorItem] = Field(min_length=1, description="One entry per item, in order.")


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
    """Answer of ``POST /v1/score`` for one model; ``results`` are in the order of the request."""

    request_id: str = Field(default="", description="Repeats the header X-Request-ID.")
    model: str = Field(description="Name of the reward model that answered.")
    revision: str = Field(description="Scorer, engine, weights and preprocessing that made the numbers.")
    preprocessing_hash: str = Field(default="", description="Short hash of what was done to the media first.")
    results: list[Score] = Field(description="One result per item.")


class RewardAnswer(StrictModel):
    """What one of several rewards says; where it failed as a whole, every item carries the same error."""

    revision: str = Field(description="Scorer, engine, weights and preprocessing that made the numbers.")
    preprocessing_hash: str = Field(description="Short hash of what was done to the media first.")
    results: list[Score] = Field(description="One result per item, in the order of the request.")


class CombinedScore(StrictModel):
    """Total of one item: ``total`` and ``parts``, or ``error`` when a part has no score."""

    total: Finite | None = Field(default=None, description="The clipped, weighted sum.")
    parts: dict[str, Finite] | None = Field(default=None, description="Each part after its clip, before its weight.")
    error: ScoreError | None = Field(default=None, description="Why there is no total.")

    @model_validator(mode="after")
    def _total_or_error(self) -> Self:
        if (self.total is None) != (self.parts is None) or (self.total is None) == (self.error is None):
            raise ValueError("an item carries either total and parts, or an error")
        return self


class MultiScoreResponse(StrictModel):
    """Answer of ``POST /v1/score`` for ``rewards``."""

    request_id: str = Field(default="", description="Repeats the header X-Request-ID.")
    rewards: dict[str, RewardAnswer] = Field(description="Answers by reward, in the order of the request.")
    combined: list[CombinedScore] | None = Field(default=None, description="One total per item, where combine was asked for.")


class ModelList(StrictModel):
    """Answer of ``GET /v1/models``."""

    models: list[ModelInfo] = Field(description="Reward models of this fleet.")


class Readiness(StrictModel):
    """Answer of ``GET /readyz`` when every model can score."""

    status: Literal["ready"] = Field(default="ready", description="Every model asked about can score.")
    models: list[str] = Field(description="Their names.")


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
    request_id: str = Field(default="", description="Repeats the header X-Request-ID.")


class JobStatus(StrictModel):
    """Answer of ``POST /v1/jobs`` (202) and ``GET /v1/jobs/{id}``: ``result`` once it succeeded, ``error`` once it failed."""

    id: str = Field(description="Name of the job.")
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"] = Field(description="Where it is; an expired job answers 410.")
    created_at: Finite = Field(description="When it was accepted, in seconds since the epoch.")
    finished_at: Finite | None = Field(default=None, description="When it ended.")
    expires_at: Finite = Field(description="When it expires: a job that has not ended by then never will, an ended one is forgotten.")
    result: ScoreResponse | MultiScoreResponse | None = Field(default=None, description="What POST /v1/score would have answered.")
    error: Problem | None = Field(default=None, description="The problem POST /v1/score would have answered.")


class FleetStatus(StrictModel):
    """Answer of ``GET /v1/status``: the figures of the page."""

    models: list[ModelHealth] = Field(description="Every reward model.")
    jobs: dict[str, int] | None = Field(default=None, description="Queued and running jobs and their bytes; null where there are no jobs.")
