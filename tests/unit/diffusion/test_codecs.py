"""Codecs: pixels to latents and back, in batches and in tiles, as diffusers does it one by one."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from diffusion.codecs import IdentityCodec, VAECodec, to_pixels, to_unit

Vae = Callable[..., AutoencoderKL]


def pictures(n: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def test_identity_is_exact() -> None:
    codec, pixels = IdentityCodec(), pictures(3, 5, 7)
    latents = codec.encode(pixels)
    assert latents.shape == (3, *codec.latent_shape(5, 7))
    assert -1 <= latents.min() < latents.max() <= 1
    np.testing.assert_array_equal(codec.decode(latents), pixels)


@pytest.mark.parametrize("keys", [{}, {"shift_factor": None}, {"use_quant_conv": False, "use_post_quant_conv": False}])
@torch.no_grad()
def test_a_vae_scales_and_shifts_as_the_pipeline_does(keys: dict[str, object], tiny_vae: Vae) -> None:
    vae, pixels = tiny_vae(**keys), pictures(2, 16, 24)
    codec = VAECodec(vae)
    latents = codec.encode(pixels)
    assert latents.shape == (2, *codec.latent_shape(16, 24)) == (2, 3, 8, 12)
    assert latents.dtype == torch.float32
    shift = vae.config.shift_factor or 0.0
    torch.testing.assert_close(latents, (vae.encode(to_unit(pixels)).latent_dist.mode() - shift) * 1.5)
    assert torch.equal(latents, codec.encode(pixels))  # no draw from the posterior
    np.testing.assert_array_equal(codec.decode(latents), to_pixels(vae.decode(latents / 1.5 + shift).sample))


def test_batches_are_split_and_give_the_same(tiny_vae: Vae) -> None:
    vae, pixels = tiny_vae(), pictures(5, 16, 24)
    sizes: list[int] = []
    for part in (vae.encoder, vae.decoder):
        part.register_forward_hook(lambda module, inputs, output: sizes.append(len(inputs[0])))
    whole, split = VAECodec(vae), VAECodec(vae, max_pixels=2 * 16 * 24)
    latents = whole.encode(pixels)
    torch.testing.assert_close(split.encode(pixels), latents, atol=1e-5, rtol=1e-5)
    difference = split.decode(latents).astype(int) - whole.decode(latents)
    assert np.abs(difference).max() <= 1  # a value at the border of two levels
    assert sizes == [5, 2, 2, 1, 2, 2, 1, 5]
    assert len(VAECodec(vae, max_pixels=1).encode(pixels[:2])) == 2


def test_only_large_images_are_tiled(tiny_vae: Vae) -> None:
    vae = tiny_vae()
    shapes: list[tuple[int, ...]] = []
    vae.decoder.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(inputs[0].shape[-2:])))
    codec = VAECodec(vae, tile_above=32)
    assert codec.decode(torch.randn(1, 3, 16, 16)).shape == (1, 32, 32, 3)
    assert shapes == [(16, 16)]
    shapes.clear()
    assert codec.decode(torch.randn(1, 3, 16, 40)).shape == (1, 32, 80, 3)
    assert len(shapes) > 1
    assert max(max(s) for s in shapes) == 16
    assert codec.encode(pictures(1, 32, 80)).shape == (1, 3, 16, 40)


def test_a_vae_is_frozen(tiny_vae: Vae) -> None:
    codec = VAECodec(tiny_vae().train())
    assert not codec.vae.training
    assert not any(p.requires_grad for p in codec.vae.parameters())


@pytest.mark.parametrize("size", [(15, 16), (16, 17), (0, 2)])
def test_sizes_without_a_latent_are_refused(size: tuple[int, int], tiny_vae: Vae) -> None:
    codec = VAECodec(tiny_vae())
    with pytest.raises(ValueError, match="pixels is not a multiple of 2, by which"):
        codec.latent_shape(*size)


def test_pixels_without_a_latent_are_refused(tiny_vae: Vae) -> None:
    with pytest.raises(ValueError, match="15x16 pixels"):
        VAECodec(tiny_vae()).encode(pictures(1, 15, 16))


def test_keys_of_other_autoencoders_are_refused() -> None:
    with pytest.raises(ValueError, match="keys AutoencoderKL does not know: scaling"):
        VAECodec.build({"_class_name": "AutoencoderKL", "scaling": 2})


def test_pictures_have_one_frame(tiny_vae: Vae) -> None:
    for codec in (IdentityCodec(), VAECodec(tiny_vae())):
        with pytest.raises(ValueError, match="samples pictures, not clips of 5 frames"):
            codec.latent_shape(16, 16, 5)
