"""What the policy is trained on: rewards by name, each with its weight."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from diffusion.config import Strict


class RewardTerm(Strict):
    """One trained reward, or one of its sub-scores (`scene.sharpness`), or a sum of them (`videoalign.vq+mq`)."""

    weight: float = Field(1.0, allow_inf_nan=False, description="weight among the trained rewards; negative punishes")
    clip: tuple[float, float] | None = Field(None, description="bounds [low, high] of its value before anything else is done with it; null = none")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.weight == 0:
            raise ValueError("weight is 0: name it under held_out_rewards instead")
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"clip {list(self.clip)} must be [low, high] with low below high")
        return self
