"""A whole SD3 or SD3.5 folder here and in diffusers: prompts to pixels without noise, pixels to latents, tiles.

The folders are `write_tiny`'s: every component of the published ones, with tiny random weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from numpy.typing import NDArray

from diffusion.checkpoint import load_codec
from diffusion.codecs import VAECodec
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.families.sd3.tiny import write_tiny
from diffusion.seeds import INITIAL, step_noise

FOLDERS: dict[str, dict[str, Any]] = {"sd35": {"style": "sd35"}, "sd3": {"style": "sd3"}, "without-t5": {"style": "sd35", "t5": False}}
SIZES = [(64, 64), (48, 80), (16, 144)]
"""Pixels: multiples of 16, one patch of latents; 3 x 5 and 1 x 9 patches are odd in number."""
PROMPTS = ["a small red circle", "", 'A sign "407", on the blue SQUARE']
T5_TOKENS = 40


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / str(request.param)
    write_tiny(path, **FOLDERS[request.param])
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> StableDiffusion3Pipeline:
    absent = {} if (folder / "text_encoder_3").exists() else {"text_encoder_3": None, "tokenizer_3": None}
    opened = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    opened.set_progress_bar_config(disable=True)
    return opened


@torch.no_grad()
def theirs(
    pipeline: StableDiffusion3Pipeline, prompt: str, params: SamplingParams, group: int, member: int, even: bool
) -> tuple[torch.Tensor, NDArray[np.uint8]]:
    """Latent and picture; the last lines of the pipeline, so that it samples once for both."""
    shape = (16, params.height // 8, params.width // 8)
    latent = pipeline(
        prompt,
        height=params.height,
        width=params.width,
        num_inference_steps=params.steps,
        sigmas=np.linspace(1, 0, params.steps + 1)[:-1] if even else None,
        guidance_scale=params.guidance,
        negative_prompt=params.negative_prompt or None,
        latents=step_noise(params.seed, group, member, INITIAL, shape)[None],
        max_sequence_length=T5_TOKENS,
        output_type="latent",
    ).images
    vae = pipeline.vae
    decoded = vae.decode(latent / vae.config.scaling_factor + vae.config.shift_factor).sample
    return latent[0], np.asarray(pipeline.image_processor.postprocess(decoded, output_type="pil")[0])


@pytest.mark.parametrize(("guidance", "negative", "grid"), [(1.0, "", "diffusers"), (4.5, "", "even"), (7.0, "a white cat", "diffusers")])
def test_prompts_become_the_pipelines_pictures(guidance: float, negative: str, grid: str, folder: Path, pipeline: StableDiffusion3Pipeline) -> None:
    """All in one batch of mixed sizes here, one by one there, and there in its own way: own grid, own encoder, own decoder."""
    params = [SamplingParams(h, w, 4, n, 3, guidance, negative) for n, (h, w) in zip((2, 1, 1), SIZES, strict=True)]
    with DiffusionEngine.from_pretrained(str(folder), t5_tokens=T5_TOKENS, grid=grid) as engine:
        samples = engine.generate(PROMPTS, params)
    for group, of_prompt in enumerate(samples):
        for one in of_prompt:
            latent, image = theirs(pipeline, one.prompt, one.params, group, one.number, grid == "even")
            assert latent.abs().mean() > 0.1
            torch.testing.assert_close(one.trajectory.latent, latent, atol=1e-4, rtol=1e-4)
            assert image.std() > 1
            assert np.abs(one.image.astype(int) - image).max() <= 1  # a value at the border of two levels
    first, second = (s.trajectory.latent for s in samples[0])
    assert (first - second).abs().max() > 0.1


def test_prompt_guidance_and_negative_prompt_all_matter(folder: Path) -> None:
    """So that equality above is not that of pictures which nothing changes."""
    base = SamplingParams(32, 32, 4, guidance=4.5)
    with DiffusionEngine.from_pretrained(str(folder), t5_tokens=T5_TOKENS) as engine:

        def latent(prompt: str, **change: Any) -> torch.Tensor:
            params = SamplingParams(**{**base.__dict__, **change})
            return engine.generate([prompt], params)[0][0].trajectory.latent

        plain = latent("a cat")
        for other in (latent("a dog"), latent("a cat", guidance=1.0), latent("a cat", negative_prompt="a sign")):
            assert (other - plain).abs().max() > 1e-3


# -- the codec ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vae(pipeline: StableDiffusion3Pipeline) -> Any:
    return pipeline.vae


def pixels(n: int, height: int, width: int) -> np.ndarray:
    """Smooth pictures, uint8 `[n, height, width, 3]`."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((k + 1) * x / 9 + c) * np.cos(y / 7 - k) for k in range(n) for c in range(3)]
    return np.rint(127.5 + 120 * np.stack(waves).reshape(n, 3, height, width).transpose(0, 2, 3, 1)).astype(np.uint8)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES)
def test_pixels_become_diffusers_latents(size: tuple[int, int], folder: Path, pipeline: StableDiffusion3Pipeline, vae: Any) -> None:
    codec, images = load_codec(folder), pixels(3, *size)
    inputs = pipeline.image_processor.preprocess(list(images.astype(np.float32) / 255))
    mean = vae.encode(inputs).latent_dist.mean
    expected = (mean - vae.config.shift_factor) * vae.config.scaling_factor
    found = codec.encode(images)
    assert found.shape == (3, 16, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    decoded = pipeline.image_processor.postprocess(vae.decode(mean).sample, output_type="pil")
    assert np.abs(codec.decode(found).astype(int) - np.stack([np.asarray(image) for image in decoded])).max() <= 1


@pytest.fixture
def codec(folder: Path) -> Callable[..., VAECodec]:
    def build(**options: int) -> VAECodec:
        made = load_codec(folder)
        assert isinstance(made, VAECodec)
        return VAECodec(made.vae, **options)

    return build


def test_sliced_is_whole(codec: Callable[..., VAECodec]) -> None:
    """A batch above `max_pixels` goes through one picture at a time."""
    images = pixels(5, 48, 80)
    latents = codec().encode(images)
    torch.testing.assert_close(codec(max_pixels=48 * 80).encode(images), latents, atol=1e-5, rtol=1e-5)
    assert np.abs(codec(max_pixels=48 * 80).decode(latents).astype(int) - codec().decode(latents).astype(int)).max() <= 1


@torch.no_grad()
def test_tiled_is_whole_between_the_seams(folder: Path) -> None:
    """On a decoder that looks at its neighbourhood alone: group norms and attention see a whole tile, and of a whole tile alone, so with
    them tiles never agree with random weights. Between seams nothing may differ, in a seam two tiles are blended."""
    made = load_codec(folder)
    assert isinstance(made, VAECodec)
    for module in made.vae.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
        for last in ("conv2", "to_out"):  # residual branches add nothing
            if last in module._modules:
                for parameter in getattr(module, last).parameters():
                    parameter.zero_()
    tile, step, seam = 128, 96, 32  # pixels; diffusers overlaps tiles by a quarter
    images = pixels(2, 208, 320)
    whole = VAECodec(made.vae, tile_above=4096)
    latents = whole.encode(images)
    expected = whole.decode(latents).astype(int)
    tiled = VAECodec(made.vae, tile_above=tile)  # a setting of the shared autoencoder: `whole` is no more
    y, x = ((np.arange(n) >= step) & (np.arange(n) % step < seam) for n in images.shape[1:3])
    between = ~(y[:, None] | x[None])
    difference = np.abs(tiled.decode(latents).astype(int) - expected)
    assert expected.std() > 5
    assert difference[:, between].max() <= 1
    assert difference.mean() < 0.05 * expected.std()
    encoded = (tiled.encode(images) - latents).abs()
    assert encoded[..., torch.from_numpy(between[::8, ::8])].max() < 1e-4
    assert encoded.mean() < 0.05 * latents.std()


@torch.no_grad()
def test_tiles_are_diffusers_tiles(codec: Callable[..., VAECodec], vae: Any) -> None:
    tiled = codec(tile_above=64)
    vae.enable_tiling()
    try:
        vae.tile_sample_min_size, vae.tile_latent_min_size = 64, 8
        images = pixels(1, 96, 160)
        mean = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean
        latents = tiled.encode(images)
        torch.testing.assert_close(latents, (mean - vae.config.shift_factor) * vae.config.scaling_factor, atol=1e-4, rtol=1e-4)
        found, expected = tiled.decode(latents)[0].astype(int), (vae.decode(mean).sample[0].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 127.5
        assert np.abs(found - expected).max() <= 1
        assert np.abs(codec().decode(latents)[0].astype(int) - found).max() > 1
    finally:
        vae.disable_tiling()
