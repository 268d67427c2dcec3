"""Clips to latents and back: diffusers' `AutoencoderKLWan`, of Wan 2.1, Wan 2.2 TI2V-5B and Cosmos-Predict2.5, frozen.

    pixels  uint8 [B, F, H, W, 3], F = 4 k + 1      latents  fp32 [B, C, k + 1, H / 8, W / 8]  (/ 16 in Wan 2.2)

Latent = (mode of the posterior - mean) / std of its channel. Encoding is causal: a latent frame depends on no later pixels, so that what
is given of a clip may be encoded without the rest. A clip is decoded a latent frame at a time, and large ones in tiles; of a decoded
clip there is one in 8 bits, and in fp32 a band of tiles.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusion.attention import constants
from diffusion.codecs import to_pixels
from diffusion.families.wan.tiles import stitched

CLASS_NAME = "AutoencoderKLWan"
UNUSED = {"clip_output"}
"""Keys of published config.json files that diffusers' class does not know and passes over."""
TILE, STRIDE = 256, 192
"""Edge and distance of tiles in pixels, diffusers' defaults."""


class ClipCodec:
    """See the module's docstring. Calls from several threads take turns: the autoencoder keeps features of earlier frames in itself.

    Args:
        vae: the autoencoder, with its weights.
        tile_above: clips with a longer edge, in pixels, go through in tiles. Whole, Wan 2.1's decoder takes 20 kB a pixel of a frame in
            fp32, nearly whatever the number of frames: 8 GB at 480 x 832, 19 GB at 720 x 1280, in tiles 4 GB.
    """

    vae: Any
    video = True

    def __init__(self, vae: nn.Module, tile_above: int = 832) -> None:
        self.vae = vae.eval().requires_grad_(False)
        config = self.vae.config
        self.channels: int = config.z_dim
        self.factor, self.stride = int(config.scale_factor_spatial), int(config.scale_factor_temporal)
        self.tile_above, self._patch = tile_above, config.patch_size
        with constants():  # a codec without weights is made on the meta device
            self._mean, self._std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        self._turn = threading.Lock()

    @classmethod
    def build(cls, values: dict[str, Any]) -> ClipCodec:
        """Codec with undefined weights from a config.json. Raises ValueError for a key that AutoencoderKLWan does not know."""
        from diffusers import AutoencoderKLWan

        extra = {k for k in values if not k.startswith("_")} - set(inspect.signature(AutoencoderKLWan.__init__).parameters) - UNUSED
        if extra:
            raise ValueError(f"keys {CLASS_NAME} does not know: {', '.join(sorted(extra))}")
        autoencoder: Any = AutoencoderKLWan
        return cls(autoencoder.from_config({k: v for k, v in values.items() if k not in UNUSED}))

    def latent_shape(self, height: int, width: int, frames: int = 1) -> tuple[int, ...]:
        """Shape `[C, f, h, w]` of a clip's latent. Raises ValueError for a size that has none."""
        if height < 1 or width < 1 or height % self.factor or width % self.factor:
            raise ValueError(f"{height}x{width} pixels is not a multiple of {self.factor}, by which this policy's VAE shrinks clips")
        if frames < 1 or frames % self.stride != 1:
            near = max(1, frames // self.stride * self.stride + 1)
            raise ValueError(f"{frames} frames are not {self.stride} k + 1, what this policy's VAE takes; next to it: {near} or {near + self.stride}")
        return self.channels, frames // self.stride + 1, height // self.factor, width // self.factor

    def pixel_frames(self, frames: int) -> int:
        """See `Codec.pixel_frames`: encoding is causal, so these are all that the first latent frames depend on."""
        return self.stride * (frames - 1) + 1

    def pixel_size(self, frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Frames, height and width of a latent's clip."""
        return self.pixel_frames(frames), height * self.factor, width * self.factor

    def encode(self, pixels: np.ndarray) -> Tensor:
        """Latents of clips of one size. Raises ValueError as `latent_shape`."""
        frames, height, width = pixels.shape[1:4]
        self.latent_shape(height, width, frames)
        with self._turn, torch.no_grad():
            return torch.stack([self._encode(clip, frames) for clip in pixels])

    def encode_first(self, picture: np.ndarray, frames: int) -> Tensor:
        """Latents `[C, f, h, w]` of a clip that is `picture` `[H, W, 3]`, and mid-grey (0 in [-1, 1]) from then on. Raises ValueError as
        `latent_shape`."""
        height, width, _ = picture.shape
        self.latent_shape(height, width, frames)
        with self._turn, torch.no_grad():
            return self._encode(picture[None], frames)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Clips of latents of one size."""
        clips = np.empty((len(latents), *self.pixel_size(*latents.shape[2:]), 3), np.uint8)
        with self._turn, torch.no_grad():
            for latent, clip in zip(latents, clips, strict=True):
                self._decode(latent, clip)
        return clips

    # -- one clip -----------------------------------------------------------------------------------------------------

    def _tiles(self, height: int, width: int) -> tuple[int, int]:
        """Edge and distance of tiles in latents, for a clip of this size in pixels."""
        if max(height, width) <= self.tile_above:
            return max(height, width) // self.factor, max(height, width) // self.factor
        return max(2, TILE // self.factor), max(1, STRIDE // self.factor)

    def _encode(self, clip: np.ndarray, frames: int) -> Tensor:
        _, height, width, _ = clip.shape
        tile, stride = self._tiles(height, width)

        def run(rows: slice, columns: slice) -> Tensor:
            y, x = (slice(s.start * self.factor, s.stop * self.factor) for s in (rows, columns))
            return self._encoded(clip[:, y, x], frames)

        bands = [band for _, band in stitched(run, height // self.factor, width // self.factor, tile, stride, 1)]
        return (torch.cat(bands, -2) - self._mean) / self._std

    def _encoded(self, clip: np.ndarray, frames: int) -> Tensor:
        """Mode of the posterior of a clip that is one tile, `[C, f, h, w]`; frames that it does not have are grey."""
        vae, parameter = self.vae, next(self.vae.parameters())
        vae.clear_cache()
        latents = []
        for start, end in [(0, 1), *((i, i + self.stride) for i in range(1, frames, self.stride))]:
            unit = torch.zeros(1, 3, end - start, *clip.shape[1:3], device=parameter.device)
            there = torch.from_numpy(clip[start:end].copy()).to(parameter.device).permute(3, 0, 1, 2)
            unit[:, :, : there.shape[1]] = there.float() / 127.5 - 1
            unit = unit.to(parameter.dtype)
            vae._enc_conv_idx = [0]
            latents.append(vae.encoder(self._patches("patchify", unit), feat_cache=vae._enc_feat_map, feat_idx=vae._enc_conv_idx))
        vae.clear_cache()
        mode: Tensor = vae.quant_conv(torch.cat(latents, 2))[0, : self.channels]
        return mode.float().cpu()

    def _patches(self, way: str, frames: Tensor) -> Tensor:
        """Frames as Wan 2.2's autoencoder works on them, and back: patches of pixels as channels."""
        from diffusers.models.autoencoders import autoencoder_kl_wan as wan

        found: Tensor = frames if self._patch is None else getattr(wan, way)(frames, patch_size=self._patch)
        return found

    def _decode(self, latent: Tensor, clip: np.ndarray) -> None:
        """Fill in a clip `[F, H, W, 3]`."""
        _, height, width, _ = clip.shape
        raw = latent.float() * self._std.to(latent.device) + self._mean.to(latent.device)
        tile, stride = self._tiles(height, width)
        if tile * self.factor >= max(height, width):  # one tile: its frames go straight into the clip
            start = 0
            for part in self._decoded(raw):
                end = start + part.shape[1]
                clip[start:end] = to_pixels(part[None])[0]
                start = end
            return

        def run(rows: slice, columns: slice) -> Tensor:
            return torch.cat(list(self._decoded(raw[..., rows, columns])), 1)

        for top, band in stitched(run, latent.shape[2], latent.shape[3], tile, stride, self.factor):
            clip[:, top : top + band.shape[-2]] = to_pixels(band[None])[0]

    def _decoded(self, raw: Tensor) -> Iterator[Tensor]:
        """Frames of one tile, `[3, 1 or 4, H, W]` in [-1, 1], a latent frame's after another's."""
        vae, parameter = self.vae, next(self.vae.parameters())
        vae.clear_cache()
        ready = vae.post_quant_conv(raw[None].to(parameter.device, parameter.dtype))
        for i in range(raw.shape[1]):
            vae._conv_idx = [0]
            part = vae.decoder(ready[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
            yield self._patches("unpatchify", part)[0].float().clamp(-1, 1).cpu()
        vae.clear_cache()
