"""The text encoder of Cosmos is that of diffusers' pipeline, on a whole folder with tiny weights."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion.checkpoint import load_network, load_text_encoder
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.families.conditioning import digest_of
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.cosmos.text import TOKENS, CosmosTextEncoder, CosmosTokens, frozen_projection
from diffusion.families.cosmos.tiny import HIDDEN, LAYERS, write_tiny
from tests.unit.diffusion.cosmos import pipeline

PROMPTS = ["a red  circle", "", "Übung, 42!\n", "a small red circle on the large black square " * 60]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("cosmos") / "pipeline"
    write_tiny(path)
    return path


@torch.no_grad()
def theirs(folder: Path, prompts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    found: torch.Tensor = pipeline(folder, dtype).encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    return found


def test_prompts_become_what_the_pipeline_makes_of_them(folder: Path) -> None:
    found = CosmosTextEncoder.load(folder).encode(PROMPTS).prompt_embeds
    assert found.shape == (4, TOKENS, LAYERS * HIDDEN)
    torch.testing.assert_close(found, theirs(folder, PROMPTS), atol=1e-4, rtol=1e-4)
    assert found.abs().sum(-1).all()  # padding is encoded too


def test_bfloat16_rounds_as_the_pipeline_does(folder: Path) -> None:
    found = CosmosTextEncoder.load(folder, torch.bfloat16).encode(PROMPTS[:1]).prompt_embeds
    expected = theirs(folder, PROMPTS[:1], torch.bfloat16).float()
    assert (found - expected).abs().mean() < 0.01


def test_an_adapters_encoder_projects_as_the_network_would(folder: Path) -> None:
    plain = load_text_encoder(folder, ModelConfig(path=str(folder)))
    projecting = load_text_encoder(folder, ModelConfig(path=str(folder), lora=LoRAConfig(rank=4)))
    network = load_network(ModelConfig(path=str(folder)))[0]
    assert isinstance(network, CosmosTransformer)
    with torch.no_grad():
        expected = network.project(plain.encode(PROMPTS).prompt_embeds)
    torch.testing.assert_close(projecting.encode(PROMPTS).prompt_embeds, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "frozen"),
    [
        ({}, False),
        ({"lora": LoRAConfig(rank=4)}, True),
        ({"lora": LoRAConfig(rank=4), "init": True}, False),
        ({"lora": LoRAConfig(rank=4, targets=("to_q", "crossattn_proj.0"))}, False),
        ({"lora": LoRAConfig(rank=4, targets=("to_q", "to_out.0"))}, True),
    ],
)
def test_the_projection_is_left_to_the_network_where_it_may_change(settings: dict[str, Any], frozen: bool) -> None:
    assert frozen_projection(ModelConfig(**settings)) == frozen


def test_what_a_prompt_becomes_does_not_depend_on_those_beside_it(folder: Path) -> None:
    encoder = CosmosTextEncoder.load(folder)
    together = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        assert digest_of(together[i]) == digest_of(encoder.encode([prompt])[0])


def test_signatures_tell_prompts_apart_that_the_encoder_does(folder: Path) -> None:
    tokens = CosmosTokens.load(folder)
    assert tokens.signature("a red circle") == tokens.signature("a red circle")
    assert tokens.signature("a red circle") != tokens.signature("a red  circle")  # nothing is cleaned


def test_a_tokenizer_that_pads_on_the_left_is_refused() -> None:
    with pytest.raises(ValueError, match="must pad on the right"):
        CosmosTokens(SimpleNamespace(padding_side="left"))


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "crossattn_proj_in_channels": 95}))
    with pytest.raises(ValueError, match="makes rows of 96 channels, the network takes 95"):
        CosmosTextEncoder.load(tmp_path / "pipeline")
