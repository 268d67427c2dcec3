"""Settings of the reward fleet and of the client that talks to it (pydantic only).

``RewardConfig.url`` decides the shape: unset, the driver starts the fleet inside its own Ray cluster and
scores through the Serve handle; set, scores come over REST from a fleet that somebody else runs.
"""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.contract import StrictModel
from services.limits import LimitsConfig
from services.scorers.settings import OcrConfig

LOCAL_MODELS = ("ocr",)


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
