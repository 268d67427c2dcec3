"""diffusers' pipelines of clips with the ODE's plain steps: their UniPC is a solver of its own, whose grid is kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler


@contextmanager
def on_grid(pipeline: Any) -> Iterator[None]:
    """The pipeline takes Euler's steps on its UniPC's grid meanwhile."""
    unipc = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)

    class Euler(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:  # type: ignore[override]
            unipc.set_timesteps(num_inference_steps)
            super().set_timesteps(sigmas=unipc.sigmas[:-1].numpy())

    original, pipeline.scheduler = pipeline.scheduler, Euler(shift=1.0)
    try:
        yield
    finally:
        pipeline.scheduler = original
