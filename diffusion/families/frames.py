"""Conditioning that frozen networks make of the frames that an example gives, beside that of its text.

Cosmos, Wan T2V, TI2V   given [C, k, h, w]               clean latents of the first k latent frames: `GivenFrames`
Wan I2V                 condition, image_embeds          `diffusion.families.wan.image.WanImageEncoder`
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from torch import Tensor

from diffusion.codecs import Codec
from diffusion.families.given import GIVEN


class FrameEncoder(Protocol):
    """Frozen encoder of a clip's first frames."""

    def encode(self, pixels: np.ndarray, frames: int) -> dict[str, Tensor]:
        """Named tensors of a clip of `frames` frames that begins with `pixels`, uint8 `[p, H, W, 3]` of the clip's size; fp32 on the CPU.
        Raises ValueError for a size that has no latent."""
        ...


class GivenFrames:
    """The latents of the given frames themselves: what comes after does not change them.

    Args:
        codec: the policy's.
    """

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    def encode(self, pixels: np.ndarray, frames: int) -> dict[str, Tensor]:
        """See `FrameEncoder.encode`."""
        return {GIVEN: self._codec.encode(pixels[None])[0].cpu()}
