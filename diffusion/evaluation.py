"""Held-out diffusion loss of a policy on fixed points."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from diffusion.precision import autocast
from diffusion.processes import ForwardProcess


@torch.no_grad()
def diffusion_losses(
    model: Callable[..., Tensor],
    process: ForwardProcess,
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    prompt_embeds: Tensor,
    pooled: Tensor,
    chunk: int = 256,
    dtype: str = "float32",
) -> Tensor:
    """Diffusion loss of each fixed point (x0, eps, t): fp32 `[n]`. All inputs have `n` rows; `chunk` rows a forward pass, which runs as
    training does, in `dtype`."""
    parts = []
    for i in range(0, len(x0), chunk):
        s = slice(i, i + chunk)
        x = process.noise(x0[s], eps[s], t[s])
        with autocast(dtype, x.device):
            prediction = model(process.model_input(x, t[s]), process.model_time(t[s]), prompt_embeds[s], pooled[s])
        parts.append(process.loss(prediction.float(), x0[s], eps[s], t[s]))
    return torch.cat(parts)
