"""Settings of the model side. Pydantic only: importing this module brings in neither torch nor ray."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Strict(BaseModel):
    """Base of every settings class of this room: unknown keys are errors, values do not change after reading."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelConfig(Strict):
    """Which policy is trained and how its forward pass runs."""

    path: str = Field("recipes/glyph-base", description="policy to start from: a folder in diffusers' layout (transformer/, text_encoder/)")
    init: bool = Field(False, description="true: read only the folder's config files and start from random weights")
    attention: Literal["auto", "sdpa", "xformers", "torch_varlen"] = Field(
        "auto", description="attention provider; auto = xformers on a GPU that has it, else sdpa"
    )
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="autocast type inside the network, same for sampling and training")


class SamplerConfig(Strict):
    """How rollouts are sampled and which of their transitions are trained."""

    kernel: Literal["flow_sde", "constant_sde", "cps", "ddim_eta"] = Field(
        "flow_sde", description="step kernel of stochastic steps: flow_sde (Flow-GRPO), constant_sde (DanceGRPO), cps, ddim_eta"
    )
    noise_level: float = Field(0.7, gt=0, le=2, description="the kernel's noise parameter: a, eta or g of its formula")
    steps: int = Field(10, ge=2, le=1000, description="denoising steps of a rollout")
    eval_steps: int = Field(20, ge=1, le=1000, description="ODE steps when evaluating (no noise, no guidance)")
    trained_steps: int | list[int] = Field(
        5, description="a number: that many step indices drawn per group; a list: exactly these indices (the last step is never trained)"
    )
    noise_on: Literal["all", "trained"] = Field(
        "all", description="all: every step but the last is stochastic; trained: only the trained steps are, the rest follow the ODE"
    )
    height: int = Field(16, ge=1, description="height of a sample in pixels")
    width: int = Field(48, ge=1, description="width of a sample in pixels")
    max_tokens: int = Field(16384, ge=1, description="token budget of one packed forward pass of the engine")

    @model_validator(mode="after")
    def _noise_level_fits(self) -> SamplerConfig:
        if self.kernel in ("cps", "ddim_eta") and self.noise_level > 1:
            raise ValueError(f"noise_level={self.noise_level:g} exceeds 1, where kernel {self.kernel} already draws all of its noise anew")
        return self

    @model_validator(mode="after")
    def _trained_steps_exist(self) -> SamplerConfig:
        last = self.steps - 1
        if isinstance(self.trained_steps, int):
            if not 1 <= self.trained_steps <= last:
                raise ValueError(f"trained_steps={self.trained_steps} must lie in 1..{last}: steps={self.steps} and the last step is never trained")
        else:
            bad = [i for i in self.trained_steps if not 0 <= i < last]
            if bad or not self.trained_steps or len(set(self.trained_steps)) != len(self.trained_steps):
                raise ValueError(
                    f"trained_steps={self.trained_steps} must be distinct indices in 0..{last - 1} (steps={self.steps}, the last step is never trained)"
                )
        return self
