"""Latent codecs: pixels to latents and back. Pixel-space policies use the identity, latent-space ones a VAE."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn


class Codec(Protocol):
    """Pixels are uint8 RGB, pictures `[B, H, W, 3]` or clips `[B, F, H, W, 3]`; latents fp32 `[B, C, h, w]` or `[B, C, f, h, w]`."""

    channels: int
    video: bool
    """Clips instead of pictures."""

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape of a picture's or a clip's latent. Raises ValueError for a size that has none."""
        ...

    def pixel_frames(self, frames: int) -> int:
        """How many frames of a clip its first `frames` latent frames are made of."""
        ...

    def encode(self, pixels: np.ndarray) -> Tensor: ...

    def decode(self, latents: Tensor) -> np.ndarray: ...


def to_unit(pixels: np.ndarray) -> Tensor:
    """uint8 `[B, …, H, W, 3]` to fp32 `[B, 3, …, H, W]` in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).movedim(-1, 1).float() / 127.5 - 1


def to_pixels(images: Tensor) -> np.ndarray:
    """`[B, 3, …, H, W]` to uint8 `[B, …, H, W, 3]`: clamps to [-1, 1] and rounds to the nearest of 256 levels."""
    unit = (images.float().clamp(-1, 1) + 1) * 127.5
    array: np.ndarray = unit.round().to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()
    return array


def refuse_frames(frames: int) -> None:
    """Raises ValueError for a clip."""
    if frames != 1:
        raise ValueError(f"this policy samples pictures, not clips of {frames} frames; set frames to 1")


class IdentityCodec:
    """Pixel space: latents are pixels scaled to [-1, 1]; with `video` those of clips."""

    channels = 3

    def __init__(self, video: bool = False) -> None:
        self.video = video

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        if self.video:
            return self.channels, frames, height, width
        refuse_frames(frames)
        return self.channels, height, width

    def pixel_frames(self, frames: int) -> int:
        return frames

    def encode(self, pixels: np.ndarray) -> Tensor:
        return to_unit(pixels)

    def decode(self, latents: Tensor) -> np.ndarray:
        return to_pixels(latents)


class VAECodec:
    """A diffusers `AutoencoderKL`, frozen: latent = (mean of the encoder - shift) x scale, so that anchor data is the same every time.

    Args:
        vae: the autoencoder, with its weights.
        tile_above: images with a longer edge go through in overlapping tiles of this size, in pixels.
        max_pixels: pixels of one call, larger batches are split: a picture of SD3.5 takes 3.1 KB a pixel at the peak of decoding in fp32.
    """

    vae: Any
    video = False

    def __init__(self, vae: nn.Module, tile_above: int = 1024, max_pixels: int = 1024 * 1024) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config = self.vae.config
        self.channels: int = config.latent_channels
        self.factor = 2 ** (len(config.block_out_channels) - 1)
        self.scale, self.shift = float(config.scaling_factor), float(config.shift_factor or 0.0)
        self.max_pixels = max_pixels
        self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = tile_above, tile_above // self.factor
        self.vae.enable_tiling()

    @classmethod
    def build(cls, values: dict[str, Any]) -> VAECodec:
        """Codec with undefined weights from a config.json. Raises ValueError for a key that AutoencoderKL does not know."""
        from diffusers import AutoencoderKL

        extra = {k for k in values if not k.startswith("_")} - set(inspect.signature(AutoencoderKL.__init__).parameters)
        if extra:
            raise ValueError(f"keys AutoencoderKL does not know: {', '.join(sorted(extra))}")
        autoencoder: Any = AutoencoderKL
        return cls(autoencoder.from_config(values))

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        refuse_frames(frames)
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(f"{height}x{width} pixels is not a multiple of {self.factor}, by which this policy's VAE shrinks images")
        return self.channels, height // self.factor, width // self.factor

    def pixel_frames(self, frames: int) -> int:
        return frames

    def _batches(self, items: Tensor, pixels_each: int) -> Iterator[Tensor]:
        parameter = next(self.vae.parameters())
        for part in items.split(max(1, self.max_pixels // pixels_each)):
            yield part.to(parameter.device, parameter.dtype)

    @torch.no_grad()
    def encode(self, pixels: np.ndarray) -> Tensor:
        height, width = pixels.shape[1:3]
        self.latent_shape(height, width)
        means = [self.vae.encode(part).latent_dist.mean.float().cpu() for part in self._batches(to_unit(pixels), height * width)]
        return (torch.cat(means) - self.shift) * self.scale

    @torch.no_grad()
    def decode(self, latents: Tensor) -> np.ndarray:
        pixels = latents.shape[-2] * latents.shape[-1] * self.factor**2
        raw = latents.float() / self.scale + self.shift
        return np.concatenate([to_pixels(self.vae.decode(part).sample) for part in self._batches(raw, pixels)])
