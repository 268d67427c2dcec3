"""Signs of reward hacking that a run looks for, and what it does about them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from diffusion.config import Strict


class HackingConfig(Strict):
    """After every held-out evaluation, against the starting policy's on the same prompts, noise and loss points."""

    stop: Literal["off", "warn", "stop"] = Field(
        "warn", description="on a sign: warn = say so; stop = checkpoint after the update and end with exit status 3; off = do not look"
    )
    loss_rise: float | None = Field(0.1, gt=0, description="sign: the held-out diffusion loss rose by more than this share; null = off")
    scene_z: float | None = Field(
        3.0,
        gt=0,
        description="sign: the mean of a scene statistic moved by more than so many standard deviations of the starting policy's pictures; null = off",
    )
    diversity_fall: float | None = Field(None, gt=0, lt=1, description="sign: diversity fell by more than this share; null = off")
