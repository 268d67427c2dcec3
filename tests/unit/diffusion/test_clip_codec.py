"""Clips to latents and back, as diffusers' AutoencoderKLWan does it on whole clips."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from diffusion.families.wan.codec import ClipCodec
from diffusion.families.wan.tiles import spans, stitched

WAN_21: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 3,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [-0.7, 0.1, 1.5],
    "latents_std": [2.8, 1.4, 0.6],
}
WAN_22: dict[str, Any] = {
    **WAN_21,
    "decoder_base_dim": 5,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
KINDS = {"2.1": WAN_21, "2.2": WAN_22}


def vae(kind: str = "2.1") -> Any:
    torch.manual_seed(0)
    model: Any = AutoencoderKLWan(**KINDS[kind]).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model


def clips(n: int, frames: int, height: int, width: int, smooth: bool = False) -> np.ndarray:
    noise = np.random.default_rng(0).integers(0, 256, (n, frames, height, width, 3), dtype=np.uint8)
    if not smooth:
        return noise
    y, x = np.mgrid[:height, :width]
    wave = np.stack([127 + 90 * np.sin(y / 40 + c) * np.cos(x / 30 - c) for c in range(3)], -1)
    return np.broadcast_to(wave.astype(np.uint8), noise.shape).copy()


@torch.no_grad()
def theirs_encoded(model: Any, pixels: np.ndarray) -> Tensor:
    unit = torch.from_numpy(pixels).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    latents: Tensor = (model.encode(unit).latent_dist.mode() - mean) * (1 / std)
    return latents


@torch.no_grad()
def theirs_decoded(model: Any, latents: Tensor) -> np.ndarray:
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (model.config.latents_mean, model.config.latents_std))
    clip = model.decode(latents * std + mean).sample
    array: np.ndarray = ((clip + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()
    return array


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_clips_go_there_and_back_as_in_diffusers(frames: int, kind: str) -> None:
    model, pixels = vae(kind), clips(2, frames, 32, 48)
    codec = ClipCodec(model)
    latents = codec.encode(pixels)
    assert latents.shape == (2, *codec.latent_shape(32, 48, frames))
    assert latents.dtype == torch.float32
    torch.testing.assert_close(latents, theirs_encoded(model, pixels), atol=1e-5, rtol=1e-5)
    assert codec.pixel_size(*latents.shape[2:]) == (frames, 32, 48)
    latents = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    difference = codec.decode(latents).astype(int) - theirs_decoded(model, latents)
    assert np.abs(difference).max() <= 1  # a value at the border of two levels


def test_the_first_frames_of_a_clip_are_encoded_without_the_others() -> None:
    codec, pixels = ClipCodec(vae()), clips(1, 9, 32, 48)
    whole = codec.encode(pixels)
    for frames, latent in ((1, 1), (5, 2)):
        torch.testing.assert_close(codec.encode(pixels[:, :frames]), whole[:, :, :latent])


def test_large_clips_go_through_in_tiles() -> None:
    model, pixels = vae(), clips(1, 5, 320, 512, smooth=True)
    whole, tiled = ClipCodec(model, tile_above=512), ClipCodec(model, tile_above=256)
    sizes: list[tuple[int, ...]] = []
    model.decoder.register_forward_hook(lambda module, inputs, output: sizes.append(tuple(inputs[0].shape[-2:])))
    latents = whole.encode(pixels)
    inside = (slice(None),) * 3 + (slice(2, -2),) * 2
    error = (tiled.encode(pixels) - latents)[inside].abs().mean()
    assert error < 0.02 * latents.std()
    exact, rough = whole.decode(latents), tiled.decode(latents)
    assert exact.shape == rough.shape == pixels.shape
    assert np.abs(exact.astype(int) - rough).mean() < 2
    assert max(max(s) for s in sizes[2:]) <= 32
    assert len(sizes) == 2 + 2 * 2 * 3


def test_stitching_gives_back_what_tiles_agree_on() -> None:
    picture = torch.randn(2, 3, 14, 23).repeat_interleave(2, -1).repeat_interleave(2, -2)

    def run(rows: slice, columns: slice) -> Tensor:
        return picture[..., 2 * rows.start : 2 * rows.stop, 2 * columns.start : 2 * columns.stop]

    bands = list(stitched(run, 14, 23, 6, 4, 2))
    assert [top for top, _ in bands] == [0, 8, 16]
    torch.testing.assert_close(torch.cat([band for _, band in bands], -2), picture)
    assert spans(14, 6, 4) == [(0, 6), (4, 10), (8, 14)]
    assert spans(5, 6, 4) == [(0, 5)]


def test_threads_take_turns() -> None:
    codec = ClipCodec(vae())
    pixels = [clips(1, 9, 32, 48), clips(1, 5, 16, 16)]
    expected = [codec.encode(p) for p in pixels]
    with ThreadPoolExecutor(4) as pool:
        for found, alone in zip(pool.map(codec.encode, pixels * 4), expected * 4, strict=True):
            assert torch.equal(found, alone)


def test_configs_of_published_files_are_known() -> None:
    codec = ClipCodec.build({"_class_name": "AutoencoderKLWan", "_diffusers_version": "0.35.0", "clip_output": False, **WAN_22})
    assert (codec.channels, codec.factor, codec.stride) == (3, 16, 4)
    with pytest.raises(ValueError, match="keys AutoencoderKLWan does not know: levels"):
        ClipCodec.build({"_class_name": "AutoencoderKLWan", "levels": 3})


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((32, 50, 5), "32x50 pixels is not a multiple of 8"),
        ((32, 48, 6), "6 frames are not 4 k [+] 1, what this policy's VAE takes; next to it: 5 or 9"),
        ((32, 48, 0), "0 frames are not"),
    ],
)
def test_sizes_without_a_latent_are_refused(size: tuple[int, int, int], message: str) -> None:
    codec = ClipCodec(vae())
    with pytest.raises(ValueError, match=message):
        codec.latent_shape(*size)


def test_a_vae_is_frozen() -> None:
    codec = ClipCodec(vae().train())
    assert not codec.vae.training
    assert not any(p.requires_grad for p in codec.vae.parameters())
