"""Captions that the glyph encoder cannot tell apart: what the committed base's version does, and what a new base's does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from diffusion.families.conditioning import collisions
from diffusion.families.glyph.signs import prompt_of
from diffusion.families.glyph.text import GlyphTextEncoder

BASE = Path(__file__).parents[3] / "recipes" / "glyph-base" / "text_encoder"
CAPTIONS = ["a red circle on black", "a black circle on red", "a sign of wood", "a large of wood"]


def test_the_old_version_merges_captions_and_collisions_finds_them() -> None:
    assert collisions(GlyphTextEncoder.create(version=1).signature, ["on red", "red on", "on blue"]) == []  # order of the words is kept
    encoder = GlyphTextEncoder.create(version=1)
    assert ["sign", "large"] in collisions(encoder.signature, ["sign", "large", "circle"])


def test_a_new_encoder_tells_captions_apart() -> None:
    encoder = GlyphTextEncoder.create()
    assert encoder.version == 2
    assert collisions(encoder.signature, [*CAPTIONS, *(prompt_of(f"{i:02d}") for i in range(100))]) == []
    pair = encoder.encode(CAPTIONS[:2])
    assert not torch.equal(pair.prompt_embeds[0].sum(0), pair.prompt_embeds[1].sum(0))  # as a set of tokens too: attention sees no order


def test_the_committed_base_keeps_its_numbers() -> None:
    base = GlyphTextEncoder.load(BASE)
    assert base.version == 1
    prompt = prompt_of("407")
    encoded, drawn = base.encode([prompt]), GlyphTextEncoder.create(version=1).encode([prompt])
    assert torch.equal(encoded.prompt_embeds, drawn.prompt_embeds)
    assert torch.equal(encoded.tensors["pooled"], drawn.tensors["pooled"])


def test_the_version_is_stored_and_an_unknown_one_refused(tmp_path: Path) -> None:
    encoder = GlyphTextEncoder.create()
    encoder.save(tmp_path)
    again = GlyphTextEncoder.load(tmp_path)
    assert torch.equal(again.encode(CAPTIONS).prompt_embeds, encoder.encode(CAPTIONS).prompt_embeds)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "GlyphTextEncoder", "max_tokens": 10, "version": 3}))
    with pytest.raises(ValueError, match="version 3; this build knows 1, 2"):
        GlyphTextEncoder.load(tmp_path)
