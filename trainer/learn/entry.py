"""What a rank is started with. Processes that only hand it on (the driver, Ray Train's controller) import nothing of torch for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actors.connect import Target
from actors.weights.transport import Transport
from trainer.config.run import RunConfig

FOLDER_VARIABLE = "DDRL_RAY_FOLDER"
"""Environment variable of every process of a local cluster: the folder that goes with it, see `trainer.run.local_ray`."""


@dataclass
class LoopSpec:
    """What every rank is given. `weights` is the WeightStore's actor handle, `transport` the way that bytes take, `encoders` the
    handles of the Encoder actors (none: each loads the text encoders itself)."""

    config: RunConfig
    target: Target
    run_dir: str
    weights: Any
    transport: Transport
    encoders: tuple[Any, ...] = ()


def train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a rank (`train_loop_per_worker`); `settings["spec"]` is a `LoopSpec`."""
    from trainer.learn.loop import run

    run(settings["spec"])
