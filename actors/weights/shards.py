"""Handing in: what a rank holds of the trained weights, cut into parts, digested and written, one part at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from actors.weights.table import Entry, Name, Shard, Sizes
from actors.weights.transport import Objects, Transport

PART_BYTES = 64 << 20
"""Bytes from which on a part is full."""
Slice = tuple[str, Sizes, Sizes, Tensor]
"""Name, shape of the whole tensor, where the slice starts in it, the slice."""


def local_slices(state: Mapping[str, Tensor], rank: int) -> Iterator[Slice]:
    """What this rank hands in of a state dict: its own part of each sharded tensor, without a collective. What every rank holds alike
    is the first one's: plain tensors, and the replicas of a mesh that has some."""
    for name, tensor in state.items():
        if not isinstance(tensor, DTensor):
            if rank == 0:
                yield name, tuple(tensor.shape), (0,) * tensor.dim(), tensor.detach()
            continue
        coordinate = tensor.device_mesh.get_coordinate()
        replica = coordinate is None or any(isinstance(p, Replicate) and i > 0 for p, i in zip(tensor.placements, coordinate, strict=True))
        local = tensor.to_local().detach()
        if not replica and local.numel():
            _, start = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
            yield name, tuple(tensor.shape), tuple(start), local


def write_slices(
    transport: Transport, slices: Iterator[Slice], name: Name, rank: int, world: int, dtype: torch.dtype | None = None, wanted: bool = False
) -> tuple[Shard, Objects]:
    """Write a rank's slices, part by part; returns its table and the objects that go with it.

    Args:
        dtype: cast floating point tensors to it; None = as they are.
        wanted: an evaluation will ask for this very version.
    """
    entries: list[Entry] = []
    objects: Objects = {}
    part: dict[str, Tensor] = {}
    waiting: list[tuple[str, Sizes, Sizes, Tensor]] = []
    number = 0

    def flush() -> None:
        nonlocal number
        where, found = transport.write(name, f"rank-{rank}-{number:03}", part)
        objects.update(found)
        entries.extend(Entry(n, shape, start, tuple(t.shape), str(t.dtype).removeprefix("torch."), digest(t), where) for n, shape, start, t in waiting)
        part.clear()
        waiting.clear()
        number += 1

    for key, shape, start, tensor in slices:
        # contiguous fp32 CPU tensors, which is what most ranks without a GPU hold, are not copied here
        own = tensor.to("cpu", dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype).contiguous()
        part[key] = own
        waiting.append((key, shape, start, own))
        if sum(t.nbytes for t in part.values()) >= PART_BYTES:
            flush()
    if part:
        flush()
    return Shard(*name, rank, world, tuple(entries), wanted), objects


def digest(tensor: Tensor) -> str:
    """xxh3-64 of a CPU tensor's bytes, hex."""
    return xxhash.xxh3_64_hexdigest(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)


def hand_in(
    store: Any,
    transport: Transport,
    state: Mapping[str, Tensor],
    name: Name,
    rank: int,
    world: int,
    deadline_s: float,
    dtype: torch.dtype | None = None,
    wanted: bool = False,
) -> bool:
    """Hand a rank's shard of `state` to the WeightStore behind the Ray handle `store`; True when this made the version complete and visible.

    Raises:
        ray.exceptions.GetTimeoutError: the store does not answer within `deadline_s`.
    """
    import ray

    shard, objects = write_slices(transport, local_slices(state, rank), name, rank, world, dtype, wanted)
    answer: bool = ray.get(store.hand_in.remote(shard, objects), timeout=deadline_s)
    return answer
