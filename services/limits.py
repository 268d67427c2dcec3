"""What one REST request may ask for (pydantic only).

Every limit is checked before the memory it guards is allocated: sizes come from Content-Length and file headers, and
what those promise is held to while the bytes arrive.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from services.contract import StrictModel


class LimitsConfig(StrictModel):
    """Limits of the REST ingress."""

    max_body_bytes: int = Field(default=67_108_864, ge=1024, description="Largest request body in bytes.")
    max_inflight_bytes: int = Field(default=536_870_912, ge=1024, description="Bytes of all bodies being worked on; beyond it new requests get 503.")
    max_header_bytes: int = Field(default=16_384, ge=1024, description="Bytes of all request headers together.")
    max_json_depth: int = Field(default=16, ge=4, le=100, description="Deepest nesting of a JSON document.")
    max_items: int = Field(default=256, ge=1, description="Most images and clips in one request.")
    max_rewards: int = Field(default=16, ge=1, description="Most rewards in one request.")
    max_prompt_chars: int = Field(default=4096, ge=1, description="Longest prompt in characters.")
    max_pixels: int = Field(default=4_194_304, ge=1, description="Most pixels (height x width) of one image or frame.")
    max_frames: int = Field(default=1024, ge=1, description="Most frames of one clip that are held in memory.")
    max_total_pixels: int = Field(default=67_108_864, ge=1, description="Most pixels of all images and frames of a request; 3 bytes each.")
    max_inflight_pixels: int = Field(default=268_435_456, ge=1, description="Pixels of all requests being worked on; further ones wait their turn.")
    max_latent_values: int = Field(default=16_777_216, ge=1, description="Most numbers in the latents of one request.")
    max_video_frames: int = Field(default=20_000, ge=1, description="Most frames in an mp4 file, looked at or not.")
    video_timeout_s: float = Field(default=20.0, gt=0, le=600, description="Longest decoding of one mp4 file, in seconds.")
    video_memory_bytes: int = Field(
        default=1 << 30, ge=1 << 27, description="Address space that the process decoding mp4 files may use beyond what it starts with."
    )
    decode_threads: int = Field(default=2, ge=1, le=64, description="Requests whose media are decoded at the same time.")
    body_timeout_s: float = Field(default=60.0, gt=0, le=3600, description="Longest arrival of a request body, in seconds.")
    default_timeout_s: float = Field(default=60.0, gt=0, le=3600, description="Deadline of a request that names none, in seconds.")
    max_timeout_s: float = Field(default=600.0, gt=0, le=3600, description="Longest deadline a request may ask for; longer ones are cut to it.")
    idempotency_ttl_s: float = Field(default=600.0, gt=0, le=86_400, description="How long an answer can be replayed by its Idempotency-Key.")
    idempotency_bytes: int = Field(default=67_108_864, ge=1024, description="Bytes of answers kept for replay; the oldest make room.")

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.max_inflight_bytes < self.max_body_bytes:
            raise ValueError(f"max_inflight_bytes ({self.max_inflight_bytes}) is below max_body_bytes ({self.max_body_bytes}): no request could be admitted")
        if self.max_inflight_pixels < self.max_total_pixels:
            raise ValueError(f"max_inflight_pixels ({self.max_inflight_pixels}) is below max_total_pixels ({self.max_total_pixels})")
        return self
