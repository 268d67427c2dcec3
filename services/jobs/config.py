"""Settings of jobs (pydantic only)."""

from __future__ import annotations

from pydantic import Field

from services.contract import StrictModel


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
