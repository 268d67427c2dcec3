"""The wire format of groups and data batches: safetensors bytes with a versioned table of names, shapes and types.

This is the only encoder and decoder. Members N, trained steps K, latent shape C h w (or C f h w), prompt tokens L D, pooled P.

    group  x, x_next         f32 [N, K, C, h, w]    states before and after each trained step
           previous          f32 [N, K, C, h, w]    prediction of x0 in the step before; only for kernels that use it
           log_prob          f64 [N, K]             exact log-density (mean over entries) under the sampling weights
           trained           i64 [K]                trained step indices
           times             f32 [steps + 1]        time grid that was sampled on
           prompt_embeds     f32 [L, D]             pooled  f32 [P]
           x0                f32 [C, h, w]          clean latent of the group's own example; only with data.pairing: own
           empty_embeds      f32 [L, D]             empty_pooled  f32 [P]; the empty prompt, only where captions are dropped
    data   x0                f32 [R, C, h, w]       clean latents
           prompt_embeds     f32 [R, L, D]          pooled  f32 [R, P]
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from safetensors.torch import load, save
from torch import Tensor

FORMAT = 3


class PayloadError(ValueError):
    """Bytes that are not a payload of the expected kind and version."""


@dataclass(frozen=True)
class GroupPayload:
    """Trained transitions of one group; see the module's table."""

    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    trained: Tensor
    times: Tensor
    prompt_embeds: Tensor
    pooled: Tensor
    previous: Tensor | None = None
    x0: Tensor | None = None
    empty_embeds: Tensor | None = None
    empty_pooled: Tensor | None = None


@dataclass(frozen=True)
class DataPayload:
    """One anchor batch; see the module's table."""

    x0: Tensor
    prompt_embeds: Tensor
    pooled: Tensor


_DIMS = {
    GroupPayload: {"x": 5, "x_next": 5, "log_prob": 2, "trained": 1, "times": 1, "prompt_embeds": 2, "pooled": 1},
    DataPayload: {"x0": 4, "prompt_embeds": 3, "pooled": 2},
}
_TYPES = {"trained": torch.int64, "log_prob": torch.float64}  # all others are float32
_LATENTS = {"x", "x_next", "previous", "x0"}  # one dimension more for video
_OPTIONAL = {GroupPayload: {"previous": 5, "x0": 3, "empty_embeds": 2, "empty_pooled": 1}, DataPayload: {}}


def encode(payload: GroupPayload | DataPayload) -> bytes:
    """Payload to bytes."""
    given = {f.name: getattr(payload, f.name) for f in fields(payload)}
    tensors = {name: tensor.contiguous() for name, tensor in given.items() if tensor is not None}
    data: bytes = save({**tensors, "format": torch.tensor([FORMAT])})
    return data


def _decode(kind: type, data: bytes) -> dict[str, Tensor]:
    try:
        tensors = load(data)
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise PayloadError(f"payload is not safetensors: {error}") from None
    version = tensors.pop("format", None)
    if version is None or version.tolist() != [FORMAT]:
        raise PayloadError(f"payload format {None if version is None else version.tolist()} is not {FORMAT}; it was written by another version of ddrl")
    dims = _DIMS[kind] | {name: count for name, count in _OPTIONAL[kind].items() if name in tensors}
    found = {name: tensor.dim() for name, tensor in tensors.items()}
    if found not in (dims, {name: count + (name in _LATENTS) for name, count in dims.items()}):
        raise PayloadError(f"{kind.__name__} needs tensors of dimensions {dims}, found {found}")
    types = {name: tensor.dtype for name, tensor in tensors.items() if tensor.dtype != _TYPES.get(name, torch.float32)}
    if types:
        raise PayloadError(f"{kind.__name__} has tensors that are not float32 (trained: int64, log_prob: float64): {types}")
    return tensors


def decode_group(data: bytes) -> GroupPayload:
    """Bytes to a group. Raises PayloadError."""
    group = GroupPayload(**_decode(GroupPayload, data))
    latents = {group.x.shape, group.x_next.shape} | ({group.previous.shape} if group.previous is not None else set())
    strays = [group.log_prob.shape != group.x.shape[:2], len(group.trained) != group.x.shape[1], group.x0 is not None and group.x0.shape != group.x.shape[2:]]
    if len(latents) > 1 or any(strays):
        raise PayloadError("group payload has tensors of clashing shapes")
    return group


def decode_data(data: bytes) -> DataPayload:
    """Bytes to a data batch. Raises PayloadError."""
    batch = DataPayload(**_decode(DataPayload, data))
    if not len(batch.x0) == len(batch.prompt_embeds) == len(batch.pooled):
        raise PayloadError("data payload has tensors of clashing shapes")
    return batch
