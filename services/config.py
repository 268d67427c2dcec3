"""Settings of the reward fleet and of the client that talks to it (pydantic only).

``RewardConfig.url`` decides the shape: unset, the driver starts the fleet inside its own Ray cluster and
scores through the Serve handle; set, scores come over REST from a fleet that somebody else runs.
"""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from services.limits import LimitsConfig
from services.schemas import StrictModel

LOCAL_MODELS = ("ocr",)


class OcrConfig(StrictModel):
    """How the OCR scorer reads a picture, and which of its sub-scores is the reward."""

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


class JobsConfig(StrictModel):
    """Jobs of ``POST /v1/jobs``; they live in Redis."""

    ttl_s: float = Field(default=3600.0, gt=0, le=2_592_000, description="A job that has not ended after this long expires; an answer is kept this long.")
    tombstone_s: float = Field(default=86_400.0, gt=0, le=2_592_000, description="How long an expired job still answers 410 instead of 404.")
    lease_s: float = Field(default=15.0, gt=0, le=3600, description="A job whose worker is silent for this long goes to another one.")
    concurrency: int = Field(default=4, ge=1, le=256, description="Jobs that one ingress replica works on at a time.")
    max_unfinished: int = Field(default=256, ge=1, description="Jobs that may wait or run; more are refused (503).")
    max_bytes: int = Field(default=1 << 30, ge=1024, description="Bytes of their bodies in Redis.")
    max_tries: int = Field(default=3, ge=1, description="Times a job is begun when its worker dies or its reward is late; then it ends as it is.")
    poll_s: float = Field(default=0.25, gt=0, le=60, description="How often an idle worker looks for jobs of other ingress replicas.")


class RewardConfig(StrictModel):
    """Which reward to train on, and where it runs."""

    url: str | None = Field(
        default=None,
        pattern=r"^https?://",
        description="Base URL of a running reward service; null starts one inside the run's own Ray cluster.",
    )
    api_key_env: str | None = Field(
        default=None,
        description="Environment variable holding the bearer token to send to url, if it needs one.",
    )
    model: str = Field(default="ocr", description="Reward model to use.")
    timeout_s: float = Field(default=60.0, gt=0, description="Deadline of one scoring call, retries included, in seconds.")
    replicas: int = Field(default=1, ge=1, description="Scorer replicas; each computes on one thread.")
    replica_cpus: float = Field(default=1.0, gt=0, description="Ray CPUs reserved per scorer replica.")
    max_batch_items: int = Field(
        default=32,
        ge=1,
        description="Most images a replica scores in one batch gathered from several requests.",
    )
    batch_wait_s: float = Field(default=0.002, ge=0, le=1, description="How long a replica waits for more requests to fill a batch.")
    max_queued_requests: int = Field(default=256, ge=1, description="Requests that may wait per caller before new ones are refused (503).")
    port: int | Literal["auto"] = Field(default="auto", description="Port of the REST ingress on 127.0.0.1; 'auto' or 0 takes a free one.")
    start_timeout_s: float = Field(default=120.0, gt=0, description="How long the fleet may take to become ready, in seconds.")
    ocr: OcrConfig = Field(default_factory=OcrConfig, description="OCR scorer.")
    limits: LimitsConfig = Field(default_factory=LimitsConfig, description="Limits of the REST ingress.")

    @model_validator(mode="after")
    def _known_model(self) -> Self:
        if self.url is None and self.model not in LOCAL_MODELS:
            raise ValueError(f"model {self.model!r} is not one this fleet can start ({', '.join(LOCAL_MODELS)}); set url to a service that has it")
        if isinstance(self.port, int) and not 0 <= self.port <= 65535:
            raise ValueError(f"port {self.port} is outside 0..65535")
        return self
