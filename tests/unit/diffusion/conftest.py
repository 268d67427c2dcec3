"""Tiny SD3 policies for the tests of the model side: random weights everywhere, so that nothing hides behind a zero."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from diffusion.families.sd3.network import SD3Config, SD3Transformer

TINY: dict[str, Any] = {
    "sample_size": 16,
    "patch_size": 2,
    "in_channels": 3,
    "out_channels": 3,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 6,
    "pos_embed_max_size": 8,
}
STYLES: dict[str, dict[str, Any]] = {"sd3": {}, "sd35": {"qk_norm": "rms_norm", "dual_attention_layers": (0,)}}


@pytest.fixture(params=STYLES)
def style(request: pytest.FixtureRequest) -> str:
    """`sd3`, then `sd35`."""
    return str(request.param)


@pytest.fixture
def tiny_model() -> Callable[..., SD3Transformer]:
    """`tiny_model(style, seed, **keys)`: a policy with every parameter random."""

    def build(style: str = "sd35", seed: int = 0, **keys: Any) -> SD3Transformer:
        generator = torch.Generator().manual_seed(seed)
        model = SD3Transformer(SD3Config(**{**TINY, **STYLES[style], **keys}))
        model.init_weights(generator)
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
        return model.eval()

    return build


@pytest.fixture
def tiny_vae() -> Callable[..., AutoencoderKL]:
    """`tiny_vae(latent_channels, **keys)`: an autoencoder of factor 2 with random weights."""

    def build(latent_channels: int = 3, **keys: Any) -> AutoencoderKL:
        torch.manual_seed(0)
        blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        config = {**blocks, "latent_channels": latent_channels, "norm_num_groups": 4, "sample_size": 16, "scaling_factor": 1.5, "shift_factor": 0.25}
        return AutoencoderKL(**{**config, **keys}).eval()

    return build
