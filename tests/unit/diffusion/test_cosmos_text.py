"""The text encoder of Cosmos is that of diffusers' pipeline, on a whole folder with tiny weights."""

from __future__ import annotations

import gc
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

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


def newer(name: str) -> str:
    """Name of a tensor as files of newer classes have it."""
    if name.startswith("visual."):
        return "model." + name
    return name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else name


@pytest.mark.parametrize("rename", [str, newer], ids=["published", "newer"])
@torch.no_grad()
def test_the_language_model_is_transformers_own_and_nothing_else_is_read(folder: Path, tmp_path: Path, rename: Callable[[str], str]) -> None:
    """Features are equal to the bit. The vision tower and the head, here 128 MB each, come into no memory, not even while files are read."""
    made: Any = transformers.Qwen2_5_VLForConditionalGeneration
    language = made.from_pretrained(folder / "text_encoder").model.language_model
    shutil.copytree(folder, tmp_path / "pipeline")
    tensors = load_file(folder / "text_encoder" / "model.safetensors")
    for name in ("visual.blocks.0.mlp.up_proj.weight", "lm_head.weight"):
        assert name in tensors
        tensors[name] = torch.ones(2**25)
    save_file({rename(name): tensor for name, tensor in tensors.items()}, tmp_path / "pipeline" / "text_encoder" / "model.safetensors", {"format": "pt"})
    del tensors
    gc.collect()

    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    before = resident("VmRSS")
    encoder = CosmosTextEncoder.load(tmp_path / "pipeline")
    assert resident("VmHWM") - before < 64e6
    assert encoder.model.state_dict().keys() == language.state_dict().keys()
    for prompt in PROMPTS[:2]:
        ids = encoder.tokens.ids(prompt)
        expected, found = (model(ids, output_hidden_states=True).hidden_states for model in (language, encoder.model))
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def resident(line: str) -> float:
    """A line of this process's memory, in bytes: VmRSS, or VmHWM, its peak."""
    found = re.search(rf"^{line}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found.group(1)) * 1024.0


def test_a_language_model_with_a_tensor_missing_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "pipeline")
    file = tmp_path / "pipeline" / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.norm.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 missing \(norm.weight\)"):
        CosmosTextEncoder.load(tmp_path / "pipeline")


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
