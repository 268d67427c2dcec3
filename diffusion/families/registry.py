"""Which networks and text encoders exist, by the class that their config.json names.

An installed package may bring a family of its own: an entry point of the group `ddrl.families`, named as the network's class, that leads to a
`Family` (docs/add-a-model.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import torch

from diffusion.codecs import Codec, VAECodec
from diffusion.config import ModelConfig
from diffusion.families.base import PackedModel
from diffusion.families.conditioning import TextEncoder
from diffusion.families.cosmos import tiny as tiny_cosmos
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.cosmos.text import REASON_CLASS, CosmosTextEncoder, CosmosTokens, frozen_projection
from diffusion.families.frames import FrameEncoder
from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3 import tiny as tiny_sd3
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.sd3.text import CLIP_CLASS, SD3TextEncoder, SD3Tokens
from diffusion.families.wan import codec as clips
from diffusion.families.wan import tiny as tiny_wan
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.image import WanImageEncoder
from diffusion.families.wan.network import WanTransformer
from diffusion.families.wan.text import UMT5_CLASS, WanTextEncoder, WanTokens

Signature = Callable[[str], bytes]
Reader = Callable[[Path, ModelConfig, torch.device], TextEncoder]
SignatureReader = Callable[[Path, ModelConfig], Signature]


@dataclass(frozen=True)
class Family:
    """A network architecture.

    Attributes:
        build: network with undefined weights from a config.json's keys and an attention provider. Raises ValueError or
            TypeError on keys or values it does not know.
        video: latents have a frame axis, `[C, f, h, w]`.
        picture: reads, from a policy's folder, what makes conditioning of the picture that a network with `needs_picture` is given; its codec
            beside. Raises ValueError, and what reading files raises.
        text_encoders, signatures: as `TEXT_ENCODERS` and `SIGNATURES`, of encoders that this family uses otherwise than others do.
    """

    build: Callable[[dict[str, Any], str], PackedModel]
    video: bool
    picture: Callable[[Path, Codec, ModelConfig, torch.device], FrameEncoder] | None = None
    text_encoders: Mapping[str, Reader] = field(default_factory=dict)
    signatures: Mapping[str, SignatureReader] = field(default_factory=dict)


def _wan_picture(folder: Path, codec: Codec, config: ModelConfig, device: torch.device) -> FrameEncoder:
    if not isinstance(codec, clips.ClipCodec):
        raise ValueError(f"image-to-video needs a vae/ of class {clips.CLASS_NAME}")
    return WanImageEncoder.load(folder, codec, getattr(torch, config.text_dtype), device)


FAMILIES = {
    "CosmosTransformer3DModel": Family(lambda values, provider: CosmosTransformer(CosmosConfig.from_dict(values), provider), video=True),
    "SD3Transformer2DModel": Family(lambda values, provider: SD3Transformer(SD3Config.from_dict(values), provider), video=False),
    "WanTransformer3DModel": Family(lambda values, provider: WanTransformer(WanConfig.from_dict(values), provider), video=True, picture=_wan_picture),
}
ENTRY_POINTS = "ddrl.families"


def family_of(name: str | None) -> Family:
    """The family of a network's class. Raises ValueError for a class that neither this build nor an installed package has."""
    if name in FAMILIES:
        return FAMILIES[name]
    others = entry_points(group=ENTRY_POINTS)
    found = [point for point in others if point.name == name]
    if not found:
        raise ValueError(f"a {name}; this build knows {', '.join([*FAMILIES, *sorted(others.names)])}, and docs/add-a-model.md says how to add one")
    family = found[0].load()
    if len(found) > 1 or not isinstance(family, Family):
        what = "more than one package brings it" if len(found) > 1 else f"{found[0].value} is no diffusion.families.registry.Family"
        raise ValueError(f"a {name}, and {what}; correct the entry points of {ENTRY_POINTS}")
    return family


CODECS: dict[str, Callable[[dict[str, Any]], Codec]] = {"AutoencoderKL": VAECodec.build, clips.CLASS_NAME: clips.ClipCodec.build}
"""A codec with undefined weights from the keys of a `vae`'s config.json, by its class. Raises ValueError on keys it does not know."""


def _sd3_text(folder: Path, config: ModelConfig, device: torch.device) -> TextEncoder:
    return SD3TextEncoder.load(folder, getattr(torch, config.text_dtype), device, config.t5_tokens)


TEXT_ENCODERS: dict[str, Reader] = {
    CLASS_NAME: lambda folder, config, device: GlyphTextEncoder.of_policy(folder),
    CLIP_CLASS: _sd3_text,
    REASON_CLASS: lambda folder, config, device: CosmosTextEncoder.load(folder, getattr(torch, config.text_dtype), device, frozen_projection(config)),
    UMT5_CLASS: lambda folder, config, device: WanTextEncoder.load(folder, getattr(torch, config.text_dtype), device),
}
"""Reads the encoder of a policy's folder, by the class of its `text_encoder`. Raises ValueError for a config it does not know, and what
reading files raises."""

SIGNATURES: dict[str, SignatureReader] = {
    CLASS_NAME: lambda folder, config: GlyphTextEncoder.of_policy(folder).signature,
    CLIP_CLASS: lambda folder, config: SD3Tokens.load(folder, config.t5_tokens).signature,
    REASON_CLASS: lambda folder, config: CosmosTokens.load(folder).signature,
    UMT5_CLASS: lambda folder, config: WanTokens.load(folder).signature,
}
"""`TextEncoder.signature` of the encoders of a policy's folder, without their weights. Raises as `TEXT_ENCODERS`."""

TINY: dict[str, Callable[[Path, Mapping[str, Mapping[str, Any]]], None]] = {
    CLIP_CLASS: tiny_sd3.write_like,
    REASON_CLASS: tiny_cosmos.write_like,
    UMT5_CLASS: tiny_wan.write_like,
}
"""Writes the tiny policy of a policy's kind (its classes, its layout, random weights) into a folder, by the class of its `text_encoder`, from
the keys of its components' config.json. One whose encoder is not listed is small itself. Raises ValueError for a layout it does not know."""
