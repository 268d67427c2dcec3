"""The frozen text encoder of the glyph world."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion.checkpoint import load_text_encoder
from diffusion.config import ModelConfig
from diffusion.families.glyph.policy import CLIPS, write_skeleton
from diffusion.families.glyph.text import PRINTABLE, GlyphTextEncoder
from diffusion.source import CheckpointError

ENCODER = GlyphTextEncoder.create()
QUOTED = st.text([c for c in PRINTABLE if c != '"'], min_size=1, max_size=6)


def sign(text: str) -> str:
    return f'a sign that says "{text}"'


def test_shapes_and_padding() -> None:
    both = ENCODER.encode([sign("407"), ""])
    assert both.prompt_embeds.shape == (2, 10, 64)
    assert both.tensors["pooled"].shape == (2, 64)
    assert torch.equal(both.prompt_embeds[1], ENCODER.tables["padding"].expand(10, 64))
    assert torch.equal(both.prompt_embeds[0, 7:], ENCODER.tables["padding"].expand(3, 64))
    assert not both.tensors["pooled"][1].any()


@given(a=QUOTED, b=QUOTED)
def test_distinct_signs_have_distinct_encodings(a: str, b: str) -> None:
    text = ENCODER.encode([sign(a), sign(b)])
    for found in (text.prompt_embeds, text.tensors["pooled"]):
        assert bool((found[0] - found[1]).abs().max() > 1e-3) == (a != b)


def test_all_short_numbers_are_told_apart() -> None:
    """Also by the pooled vector alone, permutations included."""
    prompts = [sign("".join(d)) for n in (1, 2, 3) for d in itertools.product("0123456789", repeat=n)]
    pooled = ENCODER.encode(prompts).tensors["pooled"]
    distance = torch.cdist(pooled, pooled) + 1e9 * torch.eye(len(prompts))
    assert distance.min() > 1


@given(text=QUOTED)
def test_an_encoding_does_not_depend_on_its_batch(text: str) -> None:
    alone, among = ENCODER.encode([sign(text)]), ENCODER.encode(["", sign(text), sign("1")])
    assert torch.equal(alone.prompt_embeds[0], among.prompt_embeds[1])
    assert torch.equal(alone.tensors["pooled"][0], among.tensors["pooled"][1])


def test_words_matter_and_their_case_does_not() -> None:
    plain, upper, other = ENCODER.encode([sign("12"), 'A SIGN that Says "12"', 'a shop that says "12"']).prompt_embeds
    assert torch.equal(plain, upper)
    assert not torch.equal(plain, other)


def test_save_and_load_give_the_same_encoder(tmp_path: Path) -> None:
    ENCODER.save(tmp_path / "text_encoder")
    loaded = GlyphTextEncoder.load(tmp_path / "text_encoder")
    assert loaded.max_tokens == ENCODER.max_tokens
    assert loaded.tables.keys() == ENCODER.tables.keys()
    assert all(torch.equal(loaded.tables[k], ENCODER.tables[k]) for k in ENCODER.tables)
    assert torch.equal(loaded.encode([sign("90")]).prompt_embeds, ENCODER.encode([sign("90")]).prompt_embeds)


def test_an_encoder_without_bindings_gives_no_pooled_vector(tmp_path: Path) -> None:
    """Wan's networks take none; what stands in quotes may then be as long as there are tokens."""
    GlyphTextEncoder.create(pooled_dim=0).save(tmp_path)
    encoder = GlyphTextEncoder.load(tmp_path)
    found = encoder.encode([sign("407"), "", '"1234567890"'])
    assert set(found.tensors) == {"prompt_embeds"}
    assert torch.equal(found.prompt_embeds[0, 3:7] != found.prompt_embeds[1, 3:7], torch.ones(4, 64, dtype=torch.bool))
    with pytest.raises(ValueError, match="holds 10 tokens of which 10 quoted characters"):
        encoder.encode(['"12345678901"'])


def test_an_encoder_that_gives_what_the_network_does_not_take_is_refused(tmp_path: Path) -> None:
    write_skeleton(tmp_path, CLIPS)
    assert "bindings" not in GlyphTextEncoder.of_policy(tmp_path).tables
    ENCODER.save(tmp_path / "text_encoder")
    with pytest.raises(CheckpointError, match=r"a pooled vector of 64 \(0: none\), the network takes 64 and 0; write another: .*pooled_dim=0"):
        load_text_encoder(tmp_path, ModelConfig(path=str(tmp_path)))


def test_tables_follow_the_seed() -> None:
    again, other = GlyphTextEncoder.create(), GlyphTextEncoder.create(seed=1)
    assert all(torch.equal(again.tables[k], ENCODER.tables[k]) for k in ENCODER.tables)
    assert not any(torch.equal(other.tables[k], ENCODER.tables[k]) for k in ENCODER.tables)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (sign("1234567"), r"has 4 words and 7 quoted characters; this text encoder holds 10 tokens of which 6 quoted characters"),
        ("one two three four five six seven eight nine ten eleven", "has 11 words and 0 quoted characters"),
        ('a b c d e "123456"', "has 5 words and 6 quoted characters"),
        (sign("4é7"), "characters outside printable ASCII: 'é'"),
        (sign("1\n2"), r"characters outside printable ASCII: '\\n'"),
    ],
)
def test_a_prompt_that_does_not_fit_is_named(prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        ENCODER.encode([sign("1"), prompt])
    assert repr(prompt) in str(error.value)
