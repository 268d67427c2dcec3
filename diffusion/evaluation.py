"""Held-out diffusion loss of a policy on fixed points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.families.conditioning import Conditioning
from diffusion.precision import autocast
from diffusion.processes import ForwardProcess


@torch.no_grad()
def diffusion_losses(
    model: Callable[..., Tensor],
    process: ForwardProcess,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    conditioning: Conditioning,
    chunk: int = 256,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
) -> Tensor:
    """Diffusion loss of each fixed point (x0, eps, t): fp32 `[n]`, on the CPU as all inputs are, which have `n` rows; `chunk` rows a forward
    pass, which runs as training does, in `dtype`, on `device`, where the model lies."""
    parts = []
    for i in range(0, len(x0), chunk):
        s = slice(i, i + chunk)
        x = process.noise(x0[s], eps[s], t[s])
        inputs = [part.to(device) for part in (process.model_input(x, t[s]), process.model_time(t[s]))]
        with autocast(dtype, inputs[0].device):
            prediction = model(*inputs, **conditioning.rows(s).to(device).tensors)
        parts.append(process.loss(prediction.float().cpu(), x0[s], eps[s], t[s]))
    return torch.cat(parts)
