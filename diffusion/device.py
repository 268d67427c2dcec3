"""Where a policy runs: the accelerator that was asked for, or a clear error; never another device in silence."""

from __future__ import annotations

from typing import Literal

import torch

DeviceKind = Literal["cpu", "cuda"]


class DeviceMissing(RuntimeError):
    """The device that was asked for is not there; the message says which setting asked, and what to do."""


def resolve_device(kind: DeviceKind, asked_by: str, index: int | None = None) -> torch.device:
    """The device of a process.

    Args:
        kind: what to run on.
        asked_by: the setting that decides it, e.g. `rollout.gpus=1`, for the message.
        index: which GPU; None = the current one.

    Raises:
        DeviceMissing: `cuda` where torch finds no usable GPU.
    """
    if kind == "cuda" and not torch.cuda.is_available():
        built = "is built without CUDA" if torch.version.cuda is None else "finds no usable GPU"
        key = asked_by.split("=")[0]
        raise DeviceMissing(
            f"{asked_by} asks for a GPU, but torch {torch.__version__} {built}; set {key}=0 to run on the CPU, or install a CUDA build of torch"
        )
    return torch.device(kind) if kind == "cpu" or index is None else torch.device(kind, index)
