"""Frames to patches: the resize and the normalisation that the vision tower was trained with.

The resize works on whole numbers: bicubic with antialiasing, clamped to 0..255 and rounded, as torchvision does with
uint8 tensors. Without the rounding, pixels differ by a quarter of a level on average.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from services.scorers.videoalign.frames import MERGE, PATCH, TEMPORAL_PATCH, grid

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
PATCH_VALUES = 3 * TEMPORAL_PATCH * PATCH * PATCH


def resize(frames: NDArray[np.uint8], size: tuple[int, int]) -> Tensor:
    """uint8 [T, H, W, 3] → uint8 [T, 3, h, w] of ``size`` (h, w)."""
    planes = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    if tuple(planes.shape[-2:]) == size:
        return planes
    # One frame at a time: the float copy of a whole clip in 4K would be gigabytes.
    rows = [torch.nn.functional.interpolate(plane[None].float(), size, mode="bicubic", antialias=True, align_corners=False) for plane in planes]
    return torch.cat([row.clamp_(0, 255).round_().to(torch.uint8) for row in rows])


def patchify(planes: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """uint8 [T, 3, h, w], T even and h, w multiples of 28 → float32 [patches, 1176] and the grid (t, h, w).

    Rows run over time, blocks of 2x2 patches down and across, then down and across within the block; columns over
    channel, time, y, x. This is the order of Qwen2-VL's own processor. Computed where ``planes`` are.
    """
    frames, channels, height, width = planes.shape
    t, h, w = grid(frames, height, width)
    mean, std = (torch.tensor(values, device=planes.device).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    values = (planes.float() * (1 / 255) - mean) / std
    blocks = values.reshape(t, TEMPORAL_PATCH, channels, h // MERGE, MERGE, PATCH, w // MERGE, MERGE, PATCH)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w, PATCH_VALUES), (t, h, w)
