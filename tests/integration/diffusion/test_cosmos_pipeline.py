"""A whole Cosmos-Predict2.5 folder here and in diffusers: prompts, pictures and clips to clips without noise.

The folder is `write_tiny`'s: every component of the published ones but the guardrail, with tiny random weights. diffusers goes along its
flow with Euler steps instead of UniPC, which is a solver of its own; the grid is UniPC's.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from PIL import Image
from torch import Tensor

from diffusion.checkpoint import Policy, load_policy
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.families.cosmos.tiny import write_tiny
from diffusion.processes import process_from_scheduler
from diffusion.seeds import INITIAL, step_noise
from tests.unit.diffusion.cosmos import pipeline as open_pipeline
from tests.unit.diffusion.euler import on_grid

PROMPTS = ["a small red circle", "the blue square"]
HEIGHT, WIDTH, FRAMES, STEPS = 32, 48, 9, 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("whole") / "cosmos"
    write_tiny(path)
    return path


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    return open_pipeline(folder)


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(ModelConfig(path=str(folder), grid="diffusers"))


def noise(group: int, given: int = 0) -> Tensor:
    """Starting noise of a sample `[1, 16, f, h, w]`: that of its free frames behind zeros."""
    free = step_noise(3, group, 0, INITIAL, (16, FRAMES // 4 + 1 - given, HEIGHT // 8, WIDTH // 8))
    return torch.cat([torch.zeros(16, given, *free.shape[2:]), free], 1)[None]


@torch.no_grad()
def theirs(pipeline: Any, prompt: str, latents: Tensor, guidance: float, **given: Any) -> Tensor:
    """Latent of the pipeline, whose guidance is one less than everybody else's."""
    with on_grid(pipeline):
        found: Tensor = pipeline(
            prompt=prompt,
            negative_prompt="a white cat",
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=guidance - 1,
            latents=latents,
            output_type="latent",
            **given,
        ).frames[0]
    return found


@pytest.mark.parametrize("guidance", [1.0, 3.5])
def test_prompts_become_the_pipelines_clips(guidance: float, policy: Policy, pipeline: Any) -> None:
    params = SamplingParams(HEIGHT, WIDTH, STEPS, seed=3, guidance=guidance, negative_prompt="a white cat", frames=FRAMES)
    with DiffusionEngine(policy) as engine:
        samples = engine.generate(PROMPTS, params)
    for group, (one,) in enumerate(samples):
        latent = theirs(pipeline, one.prompt, noise(group), guidance)
        assert latent.abs().mean() > 0.1
        torch.testing.assert_close(one.trajectory.latent, latent, atol=1e-4, rtol=1e-4)
        assert one.image.shape == (FRAMES, HEIGHT, WIDTH, 3)


def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))


def test_given_frames_condition_as_in_the_pipeline_beside_prompts_without(policy: Policy, pipeline: Any) -> None:
    """One batch of text-, image- and video-to-video here; one by one there, where some noise is left on given frames."""
    clip = np.random.default_rng(1).integers(0, 256, (7, HEIGHT, WIDTH, 3), dtype=np.uint8)
    image = np.asarray(picture())
    cases: list[tuple[np.ndarray | None, dict[str, Any]]] = [
        (None, {}),
        (image[None], {"image": picture()}),
        (clip[-5:], {"video": [Image.fromarray(frame) for frame in clip]}),
        (clip[-1:], {"video": [Image.fromarray(frame) for frame in clip], "num_latent_conditional_frames": 1}),
    ]
    texts = {text: policy.text_encoder.encode([text])[0].prompt_embeds for text in (*PROMPTS, "a white cat")}
    engine, requests = Engine(policy.transformer, policy.process, 4096), []
    for group, (frames, _) in enumerate(cases):
        given = {} if frames is None else {"given": policy.codec.encode(frames[None])[0]}
        k = given["given"].shape[1] if given else 0
        prompt = Conditioning({"prompt_embeds": texts[PROMPTS[group % 2]], **given})
        negative = Conditioning({"prompt_embeds": texts["a white cat"], **given})
        shape = (16, FRAMES // 4 + 1 - k, HEIGHT // 8, WIDTH // 8)
        requests.append(SampleRequest(shape, STEPS, conditioning=prompt, negative=negative, guidance=3.5, seed=3, group=group, kernel="ddim_eta"))
    found = {one.request.group: one for one in engine.run(requests) if isinstance(one, Trajectory)}
    for group, (_, options) in enumerate(cases):
        given = requests[group].conditioning.tensors.get("given")  # type: ignore[union-attr]
        k = 0 if given is None else given.shape[1]
        latent = theirs(pipeline, PROMPTS[group % 2], noise(group, k), 3.5, **options)
        torch.testing.assert_close(found[group].latent, latent[:, k:], atol=2e-4, rtol=1e-3)
        if given is not None:
            assert 0 < (latent[:, :k] - given).abs().max() < 0.03  # theirs keep (1 - t_0) of the way to the starting noise


@torch.no_grad()
def test_given_frames_come_out_bit_for_bit_as_they_went_in(policy: Policy, pipeline: Any) -> None:
    """A picture, and a clip of five frames; pixels beside the pipeline's, whose noise on the given frames moves all of them a little."""
    clip = np.random.default_rng(1).integers(0, 256, (5, HEIGHT, WIDTH, 3), dtype=np.uint8)
    params = SamplingParams(HEIGHT, WIDTH, STEPS, seed=3, guidance=3.5, negative_prompt="a white cat", frames=FRAMES)
    with DiffusionEngine(policy) as engine:
        found = engine.generate(PROMPTS[:2], [replace(params, given=clip[:1]), replace(params, given=clip)])
    for group, (one,) in enumerate(found):
        k = group + 1
        assert torch.equal(one.trajectory.whole[:, :k], policy.codec.encode(clip[None, : 1 + 4 * group])[0])
        assert one.trajectory.whole.shape[1] == FRAMES // 4 + 1
        options: dict[str, Any] = {"video": [Image.fromarray(frame) for frame in clip]} if group else {"image": Image.fromarray(clip[0])}
        latent = theirs(pipeline, PROMPTS[group], noise(group, k), 3.5, **options)
        latent = torch.cat([one.trajectory.whole[:, :k], latent[:, k:]], 1)  # theirs without that noise
        assert np.abs(one.image.astype(int) - policy.codec.decode(latent[None])[0].astype(int)).max() <= 1


@pytest.mark.parametrize("steps", [5, 35])
def test_the_grid_is_the_schedulers(steps: int, pipeline: Any) -> None:
    scheduler = UniPCMultistepScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(steps)
    found = process_from_scheduler(dict(scheduler.config), "diffusers").time_grid(steps)
    torch.testing.assert_close(found, scheduler.sigmas, atol=1e-7, rtol=0)
    assert float(found[0]) == pytest.approx(200 / 201)
