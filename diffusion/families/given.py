"""Frames that an example gives: clean latents in front of those that are sampled.

What is sampled, stored and trained are the free frames alone (`[C, f, h, w]`), so that no density, loss or payload needs a mask. A
network puts the given ones (`[C, k, h, w]`, k = 0 for text-to-video) in front of them and takes its velocities of the free ones:

    free ─► joined(given, free) ─► network, times by part ─► velocities ─► free_part
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffusion.families.conditioning import Conditioning

GIVEN = "given"
"""Name of the tensor."""
Batch = Tensor | list[Tensor]
"""Tensors of requests: stacked where their shapes are equal, else a list."""


def joined(parts: Sequence[Batch], dim: int) -> Batch:
    """Tensors of each request side by side along its `dim` (0 = channels, 1 = frames)."""
    stacked = [part for part in parts if isinstance(part, Tensor)]
    if len(stacked) == len(parts):
        return torch.cat(stacked, dim + 1)
    return [torch.cat(list(each), dim) for each in zip(*parts, strict=True)]


def free_part(whole: Batch, given: Batch) -> Batch:
    """Inverse of `joined` along frames: without those that are given."""
    if isinstance(whole, Tensor) and isinstance(given, Tensor):
        return whole[:, :, given.shape[2] :]
    free = [x[:, g.shape[1] :] for x, g in zip(whole, given, strict=True)]
    return torch.stack(free) if len({x.shape for x in free}) == 1 else free


def given_times(t: Tensor, time: float) -> Tensor:
    """Times of the parts of each request, given and free: `[B]` to `[2 B]`."""
    return torch.stack([torch.full_like(t, time), t], 1).flatten()


def whole_shape(free: tuple[int, ...], conditioning: Conditioning) -> tuple[int, ...]:
    """Shape of what the network sees of a latent: with the frames that are given."""
    given = conditioning.tensors.get(GIVEN)
    return free if given is None else (free[0], free[1] + given.shape[-3], *free[2:])


def completed(examples: Sequence[Conditioning], latents: Sequence[Tensor]) -> list[Conditioning]:
    """Examples that share a pass: where some have frames that are given, the others have none of them, by name."""
    if not any(GIVEN in one.tensors for one in examples):
        return list(examples)
    return [one if GIVEN in one.tensors else Conditioning({**one.tensors, GIVEN: x[:, :0]}) for one, x in zip(examples, latents, strict=True)]
