"""Tensors by the place they go: stock weights, low-rank updates, the head; and the fold of the updates in float32."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from services.scorers.videoalign.layout import EMBEDDING, HEAD, Slot

logger = logging.getLogger(__name__)


@dataclass
class Weights:
    """Weights as stored, by stock parameter name; ``lora_a`` and ``lora_b`` hold the factors under the weight they update."""

    scale: float
    tensors_read: int
    dense: dict[str, Tensor] = field(default_factory=dict)
    lora_a: dict[str, Tensor] = field(default_factory=dict)
    lora_b: dict[str, Tensor] = field(default_factory=dict)
    head: Tensor = field(default_factory=lambda: torch.empty(0))
    unused: tuple[str, ...] = ()


def sort_out(slots: Mapping[str, Slot], tensors: Mapping[str, Tensor], scale: float, *, tied: bool) -> Weights:
    """Put each tensor in its place. The language model's own output layer is not needed, except for its rows when ``tied``.

    A model with tied embeddings has one matrix under two names, and a checkpoint holds it twice. The reference loads both
    into the one matrix, the output layer last: should they ever differ, that one is in use.
    """
    weights = Weights(scale, len(tensors))
    places = {"weight": weights.dense, "lora_a": weights.lora_a, "lora_b": weights.lora_b}
    output: Tensor | None = None
    for source, slot in slots.items():
        if slot.role == "head":
            weights.head = tensors[source]
        elif slot.role == "unused":
            output, weights.unused = tensors[source], (source,)
        else:
            places[slot.role][slot.name] = tensors[source]
    if tied and output is not None and not torch.equal(output, weights.dense[EMBEDDING]):
        logger.warning("the checkpoint's tied embeddings differ; using lm_head's rows, as the reference does")
        weights.dense[EMBEDDING] = output
    return weights


def folded(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Stock names with W + scale * B @ A, computed in float32 and rounded once; then the head."""
    for name, tensor in weights.dense.items():
        if name in weights.lora_a:
            update = weights.lora_b[name].float() @ weights.lora_a[name].float()
            yield name, torch.add(tensor.float(), update, alpha=weights.scale).to(dtype)
        else:
            yield name, tensor.to(dtype)
    yield HEAD, weights.head.to(dtype)


def unfolded(weights: Weights, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Stock names with the weights as stored, each update's factors beside them as ``….lora_A.weight``; then the head."""
    for name, tensor in weights.dense.items():
        yield name, tensor.to(dtype)
        if name in weights.lora_a:
            layer = name.removesuffix(".weight")
            yield f"{layer}.lora_A.weight", weights.lora_a[name].to(dtype)
            yield f"{layer}.lora_B.weight", weights.lora_b[name].to(dtype)
    yield HEAD, weights.head.to(dtype)
