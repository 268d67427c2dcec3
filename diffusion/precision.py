"""The one precision policy of sampling and training: states, kernels and densities are fp32, only the network may run in bf16.

Engine and learner enter the network through `autocast` with the same setting (`model.dtype`), so both round alike.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast(dtype: str, device: torch.device) -> AbstractContextManager[object]:
    """What a forward pass runs under: nothing for `float32`, autocast for `bfloat16`. Weights stay fp32."""
    return torch.autocast(device.type, torch.bfloat16) if dtype == "bfloat16" else nullcontext()


def itemsize(dtype: str) -> int:
    """Bytes of a value inside the network."""
    return 2 if dtype == "bfloat16" else 4
