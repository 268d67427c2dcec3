"""Diversity, scene statistics, held-out loss, the pixel codec."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion import pixels
from diffusion.codecs import IdentityCodec
from diffusion.evaluation import diffusion_losses
from diffusion.families.conditioning import Conditioning
from diffusion.pixels import pairwise_rms, scene_statistics
from diffusion.processes import RectifiedFlow

BLACK, WHITE = np.zeros((4, 6, 3), np.uint8), np.full((4, 6, 3), 255, np.uint8)


def test_diversity_runs_from_identical_to_black_and_white() -> None:
    images = np.stack([np.stack([WHITE, WHITE, WHITE]), np.stack([BLACK, WHITE, WHITE]), np.stack([BLACK, BLACK, BLACK])])
    np.testing.assert_allclose(pairwise_rms(images), [0, 2 / 3, 0])
    np.testing.assert_allclose(pairwise_rms(np.stack([BLACK, WHITE])[None]), [1])


@given(seed=st.integers(0, 999), samples=st.integers(2, 5))
def test_diversity_by_hand(seed: int, samples: int) -> None:
    images = np.random.default_rng(seed).integers(0, 256, (2, samples, 3, 4, 3), dtype=np.uint8)
    for prompt, found in zip(images / 255, pairwise_rms(images), strict=True):
        pairs = [np.sqrt(((prompt[i] - prompt[j]) ** 2).mean()) for i in range(samples) for j in range(i)]
        assert found == pytest.approx(np.mean(pairs))


def test_scene_statistics_of_flat_pictures() -> None:
    zero = {"contrast": 0.0, "colourfulness": 0.0, "edge_density": 0.0}
    assert scene_statistics(BLACK[None]) == pytest.approx({"brightness": 0.0, **zero})
    assert scene_statistics(WHITE[None]) == pytest.approx({"brightness": 1.0, **zero}, abs=1e-12)
    red = np.zeros((1, 4, 6, 3), np.uint8)
    red[..., 0] = 255
    found = scene_statistics(red)
    assert found["colourfulness"] == pytest.approx(0.3 * np.hypot(1, 0.5))
    assert found["brightness"] == pytest.approx(0.299)
    assert found["contrast"] == pytest.approx(0)


def test_scene_statistics_tell_pictures_apart() -> None:
    stripes = np.zeros((1, 8, 8, 3), np.uint8)
    stripes[:, :, ::2] = 255
    halves = np.zeros((1, 8, 8, 3), np.uint8)
    halves[:, :, 4:] = 255
    fine, coarse = scene_statistics(stripes), scene_statistics(halves)
    assert fine["contrast"] == pytest.approx(coarse["contrast"]) == pytest.approx(0.5)
    assert fine["edge_density"] == pytest.approx(1.0)
    assert coarse["edge_density"] == pytest.approx(1 / 7)
    both = scene_statistics(np.concatenate([stripes, halves]))
    assert both["edge_density"] == pytest.approx((1 + 1 / 7) / 2)


def test_clips_are_their_frames() -> None:
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 5, 8, 6, 3), dtype=np.uint8)  # prompts, samples, frames
    assert scene_statistics(clips[0]) == pytest.approx(scene_statistics(clips[0].reshape(-1, 8, 6, 3)))
    pairs = [np.sqrt(((clips[1, i] / 255 - clips[1, j] / 255) ** 2).mean()) for i in range(3) for j in range(i)]
    assert pairwise_rms(clips)[1] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize("shape", [(3, 4, 4), (3, 2, 4, 6)])
@pytest.mark.parametrize("chunk", [1, 3, 256])
def test_held_out_loss_of_each_point_whatever_the_chunk(chunk: int, shape: tuple[int, ...]) -> None:
    process = RectifiedFlow(2.0)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 7, *shape, generator=g)
    wide = (-1, *[1] * len(shape))
    t, embeds, pooled = torch.rand(7, generator=g), torch.randn(7, 2, 5, generator=g), torch.randn(7, 4, generator=g)

    def model(x: torch.Tensor, t: torch.Tensor, prompt_embeds: torch.Tensor, pooled: torch.Tensor) -> torch.Tensor:
        return x * t.reshape(wide) + prompt_embeds.mean((1, 2)).reshape(wide) + pooled.sum(1).reshape(wide)

    x = process.noise(x0, eps, t)
    expected = (model(x, t, embeds, pooled) - (eps - x0)).square().flatten(1).mean(1)
    torch.testing.assert_close(diffusion_losses(model, process, x0, eps, t, Conditioning({"prompt_embeds": embeds, "pooled": pooled}), chunk), expected)


def test_a_network_held_in_bfloat16_runs_as_it_trains() -> None:
    """As beside an adapter (`model.base_dtype`), where inputs of another type would be refused."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 4, 3, 4, 4, generator=g)
    t, none = torch.rand(4, generator=g), Conditioning({"prompt_embeds": torch.zeros(4, 1, 1)})
    layer = torch.nn.Conv2d(3, 3, 1)

    def losses(dtype: str) -> torch.Tensor:
        return diffusion_losses(lambda x, t, prompt_embeds: layer(x), RectifiedFlow(2.0), x0, eps, t, none, dtype=dtype)

    expected = losses("float32")
    layer.to(torch.bfloat16)
    found = losses("bfloat16")
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_codec_round_trip_is_exact_for_all_levels() -> None:
    pixels = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    codec = IdentityCodec()
    latents = codec.encode(pixels)
    assert latents.shape == (1, 3, 16, 16)
    assert (latents.dtype, float(latents.min()), float(latents.max())) == (torch.float32, -1.0, 1.0)
    np.testing.assert_array_equal(codec.decode(latents), pixels)
    assert codec.latent_shape(16, 48) == (3, 16, 48)


def test_codec_clamps_what_lies_outside() -> None:
    decoded = IdentityCodec().decode(torch.tensor([-7.0, 9.0, 0.0]).reshape(3, 1, 1, 1).expand(3, 3, 1, 1))
    assert decoded[:, 0, 0, 0].tolist() == [0, 255, 128]


def test_numbers_are_made_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    clips = np.random.default_rng(0).integers(0, 256, (2, 3, 7, 4, 6, 3), dtype=np.uint8)
    whole = pairwise_rms(clips), scene_statistics(clips[0])
    for block in (1, 100, 150):
        monkeypatch.setattr(pixels, "BLOCK", block)
        np.testing.assert_allclose(pairwise_rms(clips), whole[0], rtol=1e-12)
        assert scene_statistics(clips[0]) == pytest.approx(whole[1], rel=1e-12)
