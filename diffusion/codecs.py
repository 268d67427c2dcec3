"""Latent codecs: pixels to latents and back. Pixel-space policies use the identity."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class Codec(Protocol):
    """Pixels are uint8 RGB `[B, H, W, 3]`; latents fp32 `[B, C, h, w]`."""

    channels: int

    def latent_size(self, height: int, width: int) -> tuple[int, int]: ...

    def encode(self, pixels: np.ndarray) -> Tensor: ...

    def decode(self, latents: Tensor) -> np.ndarray: ...


class IdentityCodec:
    """Pixel space: latents are pixels scaled to [-1, 1]. Decoding clamps and rounds to the nearest of 256 levels."""

    channels = 3

    def latent_size(self, height: int, width: int) -> tuple[int, int]:
        return height, width

    def encode(self, pixels: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(pixels)).permute(0, 3, 1, 2).float() / 127.5 - 1

    def decode(self, latents: Tensor) -> np.ndarray:
        unit = (latents.float().clamp(-1, 1) + 1) * 127.5
        array: np.ndarray = unit.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()
        return array
