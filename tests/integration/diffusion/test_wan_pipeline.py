"""A whole Wan folder here and in diffusers: prompts to clips without noise.

The folder is `write_tiny`'s: every component of the published ones, with tiny random weights. diffusers goes along its flow with Euler
steps instead of UniPC, which is a solver of its own; the grid is UniPC's.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from diffusion.checkpoint import load_codec, load_policy
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.families.wan.codec import ClipCodec
from diffusion.families.wan.image import WanImageEncoder
from diffusion.families.wan.tiny import write_tiny
from diffusion.processes import process_from_scheduler
from diffusion.seeds import INITIAL, step_noise
from diffusion.source import CheckpointError
from tests.unit.diffusion.euler import on_grid
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.run.preflight import check_policy

SIZES = [(5, 32, 48), (1, 48, 16), (9, 32, 32)]
"""Frames, height, width: multiples of 16, one patch of latents; 5 frames are 2 latent ones, odd numbers of patches among them."""
PROMPTS = ["a small red circle", "", 'A sign "407", on the blue SQUARE']


@pytest.fixture(scope="module", params=["t2v", "ti2v"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / str(request.param)
    write_tiny(path, request.param)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> WanPipeline:
    opened = WanPipeline.from_pretrained(folder)
    opened.set_progress_bar_config(disable=True)
    return opened


@torch.no_grad()
def theirs(pipeline: WanPipeline, prompt: str, params: SamplingParams, shape: tuple[int, ...], group: int, member: int) -> torch.Tensor:
    """Latent; Euler's steps on UniPC's grid."""
    with on_grid(pipeline):
        latent: torch.Tensor = pipeline(
            prompt,
            height=params.height,
            width=params.width,
            num_frames=params.frames,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance,
            negative_prompt=params.negative_prompt or None,
            latents=step_noise(params.seed, group, member, INITIAL, shape)[None],
            output_type="latent",
        ).frames[0]
    return latent


@pytest.mark.parametrize(("guidance", "negative"), [(1.0, ""), (5.0, "a white cat")])
def test_prompts_become_the_pipelines_clips(guidance: float, negative: str, folder: Path, pipeline: WanPipeline) -> None:
    """All in one batch of mixed sizes here, one picture beside clips; one by one there."""
    step = pipeline.vae.config.scale_factor_spatial // 8
    params = [SamplingParams(h * step, w * step, 4, n, 3, guidance, negative, frames=f) for n, (f, h, w) in zip((2, 1, 1), SIZES, strict=True)]
    with DiffusionEngine.from_pretrained(str(folder), grid="diffusers") as engine:
        samples = engine.generate(PROMPTS, params)
    vae = pipeline.vae
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    for group, of_prompt in enumerate(samples):
        for one in of_prompt:
            latent = theirs(pipeline, one.prompt, one.params, one.trajectory.request.shape, group, one.number)
            assert latent.abs().mean() > 0.1
            torch.testing.assert_close(one.trajectory.latent, latent, atol=1e-4, rtol=1e-4)
            with torch.no_grad():
                clip = pipeline.video_processor.postprocess_video(vae.decode(latent[None] * std + mean).sample, output_type="np")[0]
            assert one.image.shape == (one.params.frames, one.params.height, one.params.width, 3)
            assert clip.std() > 1e-3
            assert np.abs(one.image.astype(float) - 255 * clip).max() <= 1
    first, second = (s.trajectory.latent for s in samples[0])
    assert (first - second).abs().max() > 0.1


@pytest.mark.parametrize("steps", [4, 10, 50])
def test_the_grid_is_the_schedulers(steps: int, pipeline: WanPipeline) -> None:
    scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    found = process_from_scheduler(dict(scheduler.config), "diffusers").time_grid(steps)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-7, rtol=0)


# -- image-to-video -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("style", ["i2v", "ti2v"])
@torch.no_grad()
def test_pictures_become_the_pipelines_clips(style: Literal["i2v", "ti2v"], guidance: float, tmp_path: Path) -> None:
    """Wan 2.1 has the picture's features and latents beside the sampled frames, TI2V-5B has it as a given frame."""
    path = tmp_path / style
    write_tiny(path, style)
    policy, pipeline = load_policy(ModelConfig(path=str(path), grid="diffusers")), WanImageToVideoPipeline.from_pretrained(path)
    pipeline.set_progress_bar_config(disable=True)
    codec = policy.codec
    assert isinstance(codec, ClipCodec)
    height, width, frames = 6 * codec.factor, 4 * codec.factor, 9
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    extra = WanImageEncoder.load(path, codec).encode(picture[None], frames) if style == "i2v" else {"given": codec.encode(picture[None, None])[0]}
    k = 1 if style == "ti2v" else 0
    shape = (codec.channels, 3 - k, 6, 4)
    texts = [policy.text_encoder.encode([text])[0].prompt_embeds for text in ("a red circle", "a white cat")]
    prompt, negative = (Conditioning({"prompt_embeds": text, **extra}) for text in texts)
    one = SampleRequest(shape, 4, conditioning=prompt, negative=negative, guidance=guidance, seed=3, kernel="ddim_eta")
    (found,) = Engine(policy.transformer, policy.process, 4096).run([one])
    assert isinstance(found, Trajectory)
    noise = step_noise(3, 0, 0, INITIAL, shape)
    with on_grid(pipeline):
        latent = pipeline(
            Image.fromarray(picture),
            "a red circle",
            "a white cat",
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=4,
            guidance_scale=guidance,
            latents=torch.cat([torch.zeros(codec.channels, k, 6, 4), noise], 1)[None],
            output_type="latent",
        ).frames[0]
    torch.testing.assert_close(found.latent, latent[:, k:], atol=1e-4, rtol=1e-4)
    if k:
        torch.testing.assert_close(latent[:, :1], extra["given"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("style", ["i2v", "ti2v"])
@torch.no_grad()
def test_what_is_drawn_from_a_picture_is_what_the_pipeline_draws(style: Literal["i2v", "ti2v"], tmp_path: Path) -> None:
    """Pixels, and the given latent bit for bit."""
    write_tiny(tmp_path, style)
    pipeline = WanImageToVideoPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    with DiffusionEngine.from_pretrained(str(tmp_path), grid="diffusers") as engine:
        codec = engine.policy.codec
        assert isinstance(codec, ClipCodec)
        height, width, frames = 6 * codec.factor, 4 * codec.factor, 9
        picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        params = SamplingParams(height, width, 4, 1, 3, 3.0, "a white cat", frames=frames, given=picture[None])
        (one,) = engine.generate(["a red circle"], params)[0]
        with pytest.raises(ValueError, match="2 given frames make no whole latent frames of this policy; give 5"):
            engine.generate([""], replace(params, given=np.stack([picture, picture])))
        with pytest.raises(ValueError, match="given frames are "):
            engine.generate([""], replace(params, given=picture[None, :-8]))
        if style == "ti2v":
            assert torch.equal(one.trajectory.whole[:, :1], codec.encode(picture[None, None])[0])
    k = 3 - one.trajectory.latent.shape[1]
    assert k == (style == "ti2v")
    with on_grid(pipeline):
        clip = pipeline(
            Image.fromarray(picture),
            "a red circle",
            "a white cat",
            height=height,
            width=width,
            num_frames=frames,
            num_inference_steps=4,
            guidance_scale=3.0,
            latents=torch.cat([torch.zeros(codec.channels, k, 6, 4), step_noise(3, 0, 0, INITIAL, one.trajectory.request.shape)], 1)[None],
            output_type="np",
        ).frames[0]
    assert one.image.shape == (frames, height, width, 3)
    assert clip.std() > 1e-3
    assert np.abs(one.image.astype(float) - 255 * clip).max() <= 1


def test_what_a_run_cannot_do_with_a_folder_is_said_at_start(tmp_path: Path) -> None:
    """A picture that nobody gives, frames that are given and not there, a second network that nobody would train."""
    write_tiny(tmp_path / "i2v", "i2v")
    write_tiny(tmp_path / "t2v")

    def checked(policy: str, prompts: str = "data", **sampler: object) -> None:
        size = {"height": 16, "width": 16, "frames": 5}
        check_policy(parse_config({"model": {"path": str(tmp_path / policy)}, "sampler": size | sampler, "prompts": {"kind": prompts}}))

    with pytest.raises(ConfigError, match=r"image-to-video: it is given one frame, not 0; set sampler\.given_frames to 1"):
        checked("i2v")
    with pytest.raises(ConfigError, match="image-to-video: it is given one frame, not 2"):
        checked("i2v", given_frames=[1, 2])
    with pytest.raises(ConfigError, match="2 given frames leave none of 2 latent frames to be sampled"):
        checked("t2v", given_frames=2)
    with pytest.raises(ConfigError, match=r"has a text only, and sampler\.given_frames asks for frames of its clip"):
        checked("t2v", "ocr_scenes", given_frames=1)
    write_tiny(tmp_path / "two")
    shutil.copytree(tmp_path / "two" / "transformer", tmp_path / "two" / "transformer_2")
    index = tmp_path / "two" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "transformer_2": ["diffusers", "WanTransformer3DModel"]}))
    with pytest.raises(CheckpointError, match=r"two networks that share a trajectory \(transformer, transformer_2"):
        load_policy(ModelConfig(path=str(tmp_path / "two")))


def test_a_policy_is_read_whole(folder: Path) -> None:
    policy = load_policy(ModelConfig(path=str(folder)))
    codec = load_codec(folder)
    assert codec.video
    assert policy.transformer.latent_channels == codec.channels
    assert policy.text_encoder.encode(["a cat"]).tokens == 512
