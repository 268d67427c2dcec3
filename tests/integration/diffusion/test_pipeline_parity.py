"""The engine without noise is diffusers' SD3 pipeline: same weights, same first latents, same latents and images at the end.

Wan's pipeline needs its own VAE and text encoder, so its network is stepped by diffusers' scheduler by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline, WanTransformer3DModel

from diffusion.checkpoint import load_codec, load_network
from diffusion.codecs import Codec
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.families.conditioning import Conditioning
from diffusion.processes import RectifiedFlow, process_from_scheduler
from diffusion.seeds import INITIAL, step_noise

SIZES = [(32, 32), (16, 48), (32, 16)]
"""Pixels; latents are half of that, patches a quarter."""


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusion3Pipeline:
    """SD3.5's architecture, tiny, with random weights; no text encoders."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=12,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
        dual_attention_layers=(0, 1),
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    encoders = {f"{part}{i}": None for part in ("text_encoder", "tokenizer") for i in ("", "_2", "_3")}
    made = StableDiffusion3Pipeline(transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **encoders)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def ours(pipeline: StableDiffusion3Pipeline, tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, Codec]:
    """The folder that the pipeline saves, opened here."""
    folder: Path = tmp_path_factory.mktemp("saved")
    pipeline.save_pretrained(folder)
    process = process_from_scheduler(json.loads((folder / "scheduler" / "scheduler_config.json").read_text()))
    return Engine(load_network(ModelConfig(path=str(folder)))[0], process, max_tokens=4096), load_codec(folder)


def conditioning(seed: int) -> Conditioning:
    g = torch.Generator().manual_seed(seed)
    return Conditioning({"prompt_embeds": torch.randn(7, 24, generator=g), "pooled": torch.randn(12, generator=g)})


def text(seed: int) -> Conditioning:
    """Of a network without a pooled vector."""
    return Conditioning({"prompt_embeds": conditioning(seed).prompt_embeds})


def requests(steps: int, guidance: float) -> list[SampleRequest]:
    return [
        SampleRequest((4, h // 2, w // 2), steps, conditioning=conditioning(i), negative=conditioning(100 + i), guidance=guidance, seed=3, group=i, n=2)
        for i, (h, w) in enumerate(SIZES)
    ]


def diffusers_run(pipeline: StableDiffusion3Pipeline, request: SampleRequest, member: int, output: str) -> np.ndarray | torch.Tensor:
    """The pipeline on the time grid that is linear in u from 1 to 0 before the shift; its own default ends a little above 0."""
    c, n = request.conditioning, request.negative
    assert c is not None
    assert n is not None
    return pipeline(
        height=2 * request.shape[1],
        width=2 * request.shape[2],
        num_inference_steps=request.steps,
        sigmas=np.linspace(1, 0, request.steps + 1)[:-1],
        guidance_scale=request.guidance,
        prompt_embeds=c.prompt_embeds[None],
        pooled_prompt_embeds=c.tensors["pooled"][None],
        negative_prompt_embeds=n.prompt_embeds[None],
        negative_pooled_prompt_embeds=n.tensors["pooled"][None],
        latents=step_noise(request.seed, request.group, member, INITIAL, request.shape)[None],
        output_type=output,
    ).images[0]


def check(pipeline: StableDiffusion3Pipeline, codec: Codec, found: list[Trajectory]) -> None:
    for one in found:
        expected = diffusers_run(pipeline, one.request, one.member, "latent")
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(one.latent, expected, atol=1e-4, rtol=1e-4)
        image = np.asarray(diffusers_run(pipeline, one.request, one.member, "pil"))
        assert image.std() > 1
        difference = codec.decode(one.latent[None])[0].astype(int) - image
        assert np.abs(difference).max() <= 1  # a value at the border of two levels


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_latents_and_images_are_the_pipelines(steps: int, guidance: float, pipeline: StableDiffusion3Pipeline, ours: tuple[Engine, Codec]) -> None:
    engine, codec = ours
    found = engine.run(requests(steps, guidance))
    assert len(found) == 2 * len(SIZES)
    check(pipeline, codec, found)


def test_mixed_lengths_and_guidance_in_one_batch(pipeline: StableDiffusion3Pipeline, ours: tuple[Engine, Codec]) -> None:
    """Sizes, step counts and guidance of all kinds share the forwards; each sample is what the pipeline makes alone."""
    engine, codec = ours
    found = engine.run([r for steps, guidance in ((3, 1.0), (5, 4.5), (8, 2.0)) for r in requests(steps, guidance)])
    check(pipeline, codec, found)


def test_padding_to_buckets_changes_nothing(pipeline: StableDiffusion3Pipeline, ours: tuple[Engine, Codec], monkeypatch: pytest.MonkeyPatch) -> None:
    engine, codec = ours
    monkeypatch.setattr(engine.runner.model, "buckets", 8)
    check(pipeline, codec, engine.run(requests(4, 4.5)))


@torch.no_grad()
def wan_run(network: WanTransformer3DModel, request: SampleRequest, member: int, shift: float) -> torch.Tensor:
    c, n = request.conditioning, request.negative
    assert c is not None
    assert n is not None
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 0, request.steps + 1)[:-1])
    x = step_noise(request.seed, request.group, member, INITIAL, request.shape)[None]
    for t in scheduler.timesteps:
        conditional, unconditional = (network(x, t[None], e.prompt_embeds[None]).sample for e in (c, n))
        x = scheduler.step(unconditional + request.guidance * (conditional - unconditional), t, x, return_dict=False)[0]
    return x[0]


def test_wan_clips_of_mixed_length_are_those_of_diffusers_network(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 2}
    theirs = WanTransformer3DModel(**sizes, text_dim=24, freq_dim=8, ffn_dim=32).eval()
    theirs.save_pretrained(tmp_path / "transformer")
    engine = Engine(load_network(ModelConfig(path=str(tmp_path)))[0], RectifiedFlow(shift=3.0), max_tokens=4096)
    asked = [
        SampleRequest((4, *clip), steps, conditioning=text(i), negative=text(100 + i), guidance=guidance, seed=3, group=i, n=2)
        for i, (clip, steps, guidance) in enumerate((((1, 8, 8), 4, 1.0), ((5, 4, 6), 6, 5.0), ((3, 8, 4), 6, 1.0)))
    ]
    for one in engine.run(asked):
        expected = wan_run(theirs, one.request, one.member, shift=3.0)
        assert expected.abs().mean() > 0.1
        torch.testing.assert_close(one.latent, expected, atol=1e-4, rtol=1e-4)
