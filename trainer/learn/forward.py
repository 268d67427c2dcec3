"""The policy's prediction as the learner replays it: the same network, input, time and guidance as the sampling engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion.families.conditioning import Conditioning
from diffusion.precision import autocast
from diffusion.processes import ForwardProcess
from trainer.learn.objective import Anchors, Samples, Transitions


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: scale g, and the conditioning of the unconditional branch."""

    scale: float
    negative: Conditioning


def policy_prediction(
    model: Callable[..., Tensor], process: ForwardProcess, rows: Transitions, conditioning: Conditioning, guidance: Guidance | None, dtype: str
) -> Tensor:
    """Prediction at `(x, t)` of every row, `[M, …]`; guided, u + g (c - u) in fp32.

    The unconditional branch is a constant of the loss, as Flow-GRPO trains it: its forward pass keeps no graph. With guidance
    every call makes two forward passes, on every rank alike.

    Args:
        process: the space of the states: the step kernel's process.
        conditioning: of every row, `[M, …]`.
        dtype: precision inside the network, `float32` or `bfloat16`.
    """
    x, t = process.model_input(rows.x, rows.t), process.model_time(rows.t)
    unconditional: Tensor | None = None
    if guidance is not None:
        # an autocast region of its own: low-precision copies of the weights made without a graph must not reach the other pass
        with torch.no_grad(), autocast(dtype, x.device):
            # the negative prompt instead of the text; frames that are given stay
            unconditional = model(x, t, **{**conditioning.tensors, **guidance.negative.expand(len(x)).tensors}).float()
    with autocast(dtype, x.device):
        prediction = model(x, t, **conditioning.tensors)
    if guidance is None or unconditional is None:
        return prediction
    return unconditional + guidance.scale * (prediction.float() - unconditional)


def data_prediction(model: Callable[..., Tensor], process: ForwardProcess, rows: Anchors | Samples, conditioning: Conditioning, dtype: str) -> Tensor:
    """Prediction for noised anchor data or rollouts, `[M, …]`; `process` is the policy's own, `conditioning` of every row, `[M, …]`. Never guided."""
    x = process.noise(rows.x0, rows.eps, rows.t)
    with autocast(dtype, x.device):
        return model(process.model_input(x, rows.t), process.model_time(rows.t), **conditioning.tensors)
