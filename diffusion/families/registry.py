"""Which networks and text encoders exist, by the `_class_name` of their config.json."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion.families.base import PackedModel
from diffusion.families.conditioning import TextEncoder
from diffusion.families.glyph.text import CLASS_NAME, GlyphTextEncoder
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.network import WanConfig, WanTransformer


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
    "SD3Transformer2DModel": Family(lambda values, provider: SD3Transformer(SD3Config.from_dict(values), provider), video=False),
    "WanTransformer3DModel": Family(lambda values, provider: WanTransformer(WanConfig.from_dict(values), provider), video=True),
}

TEXT_ENCODERS: dict[str, Callable[[Path], TextEncoder]] = {CLASS_NAME: GlyphTextEncoder.load}
"""Reads an encoder from its folder. Raises ValueError for a config it does not know, and what reading files raises."""
