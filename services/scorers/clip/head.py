"""The five linear layers that LAION's predictor and ImageReward put on an embedding, published as one Sequential.

There are dropouts between them and no activation: in use they are one affine map.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from services.scorers.clip.errors import ModelFolderError

LAYERS = (0, 2, 4, 6, 7)  # places of the linear layers in the Sequential


def linear_head(where: str, tensors: Mapping[str, Tensor], width: int) -> list[tuple[Tensor, Tensor]]:
    """Weights and biases, float32, from tensors named ``layers.N.weight|bias`` for embeddings of ``width``.

    Raises ``ModelFolderError`` unless they are exactly these and end in one number.
    """
    expected = {f"layers.{i}.{part}" for i in LAYERS for part in ("weight", "bias")}
    if set(tensors) != expected:
        raise ModelFolderError(f"{where} holds {sorted(tensors)[:12]}, the head is {sorted(expected)}")
    head = [(tensors[f"layers.{i}.weight"].float(), tensors[f"layers.{i}.bias"].float()) for i in LAYERS]
    widths = [width, *(int(weight.shape[0]) for weight, _ in head)]
    if [tuple(weight.shape) for weight, _ in head] != list(zip(widths[1:], widths, strict=False)) or widths[-1] != 1:
        raise ModelFolderError(f"{where} does not fit embeddings of width {width}: layers {[tuple(w.shape) for w, _ in head]}")
    return head


def apply_head(head: Sequence[tuple[Tensor, Tensor]], embeddings: Tensor) -> Tensor:
    """Float32 embeddings [B, width] → [B]."""
    x = embeddings
    for weight, bias in head:
        x = torch.nn.functional.linear(x, weight, bias)
    return x.squeeze(-1)
