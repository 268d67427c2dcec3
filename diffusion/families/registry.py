"""Which networks and text encoders exist, by the class that their config.json names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffusion.codecs import Codec, VAECodec
from diffusion.config import ModelConfig
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import TextEncoder
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.cosmos.text import REASON_CLASS, CosmosTextEncoder, CosmosTokens, frozen_projection
from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.sd3.text import CLIP_CLASS, SD3TextEncoder, SD3Tokens
from diffusion.families.sd3.tiny import write_like
from diffusion.families.wan import codec as clips
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from diffusion.families.wan.text import UMT5_CLASS, WanTextEncoder, WanTokens


@dataclass(frozen=True)
class Family:
    """A network architecture.

    Attributes:
        build: network with undefined weights from a config.json's keys and an attention provider. Raises ValueError or
            TypeError on keys or values it does not know.
        video: latents have a frame axis, `[C, f, h, w]`.
    """

    build: Callable[[dict[str, Any], str], PackedModel]
    video: bool


FAMILIES = {
    "CosmosTransformer3DModel": Family(lambda values, provider: CosmosTransformer(CosmosConfig.from_dict(values), provider), video=True),
    "SD3Transformer2DModel": Family(lambda values, provider: SD3Transformer(SD3Config.from_dict(values), provider), video=False),
    "WanTransformer3DModel": Family(lambda values, provider: WanTransformer(WanConfig.from_dict(values), provider), video=True),
}


CODECS: dict[str, Callable[[dict[str, Any]], Codec]] = {"AutoencoderKL": VAECodec.build, clips.CLASS_NAME: clips.ClipCodec.build}
"""A codec with undefined weights from the keys of a `vae`'s config.json, by its class. Raises ValueError on keys it does not know."""


def _sd3_text(folder: Path, config: ModelConfig, device: torch.device) -> TextEncoder:
    return SD3TextEncoder.load(folder, getattr(torch, config.text_dtype), device, config.t5_tokens)


TEXT_ENCODERS: dict[str, Callable[[Path, ModelConfig, torch.device], TextEncoder]] = {
    CLASS_NAME: lambda folder, config, device: GlyphTextEncoder.of_policy(folder),
    CLIP_CLASS: _sd3_text,
    REASON_CLASS: lambda folder, config, device: CosmosTextEncoder.load(folder, getattr(torch, config.text_dtype), device, frozen_projection(config)),
    UMT5_CLASS: lambda folder, config, device: WanTextEncoder.load(folder, getattr(torch, config.text_dtype), device),
}
"""Reads the encoder of a policy's folder, by the class of its `text_encoder`. Raises ValueError for a config it does not know, and what
reading files raises."""

Signature = Callable[[str], bytes]
SIGNATURES: dict[str, Callable[[Path, ModelConfig], Signature]] = {
    CLASS_NAME: lambda folder, config: GlyphTextEncoder.of_policy(folder).signature,
    CLIP_CLASS: lambda folder, config: SD3Tokens.load(folder, config.t5_tokens).signature,
    REASON_CLASS: lambda folder, config: CosmosTokens.load(folder).signature,
    UMT5_CLASS: lambda folder, config: WanTokens.load(folder).signature,
}
"""`TextEncoder.signature` of the encoders of a policy's folder, without their weights. Raises as `TEXT_ENCODERS`."""

TINY: dict[str, Callable[[Path, Mapping[str, Mapping[str, Any]]], None]] = {CLIP_CLASS: write_like}
"""Writes the tiny policy of a policy's kind (its classes, its layout, random weights) into a folder, by the class of its `text_encoder`, from
the keys of its components' config.json. One whose encoder is not listed is small itself. Raises ValueError for a layout it does not know."""
