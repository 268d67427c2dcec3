"""The text encoder of Wan is that of diffusers' pipeline, on a whole folder with tiny weights."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline

from diffusion.families.conditioning import digest_of
from diffusion.families.wan.text import TOKENS, WanTextEncoder, WanTokens, cleaned
from diffusion.families.wan.tiny import WIDTH, write_tiny

LONG = "a small red circle on the large black square and a cat in the sign of WINTER 1234567890 " * 30
PROMPTS = ["a red  circle", "", "&amp;quot;caf\u00c3\u00a9&amp;quot;\n  42!", LONG]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("wan") / "pipeline"
    write_tiny(path)
    return path


@torch.no_grad()
def theirs(folder: Path, prompts: list[str], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    pipeline = WanPipeline.from_pretrained(folder, torch_dtype=dtype)
    found: torch.Tensor = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False, max_sequence_length=TOKENS)[0]
    return found


def test_prompts_become_what_the_pipeline_makes_of_them(folder: Path) -> None:
    found = WanTextEncoder.load(folder).encode(PROMPTS).prompt_embeds
    assert found.shape == (4, TOKENS, WIDTH)
    torch.testing.assert_close(found, theirs(folder, PROMPTS), atol=1e-5, rtol=1e-5)
    assert not found[0, 20:].any()  # rows behind the prompt are zeros
    assert found[3].abs().sum(-1).all()  # a prompt that was cut has none


def test_bfloat16_rounds_as_the_pipeline_does(folder: Path) -> None:
    found = WanTextEncoder.load(folder, torch.bfloat16).encode(PROMPTS[:2]).prompt_embeds
    expected = theirs(folder, PROMPTS[:2], torch.bfloat16).float()
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.03 * expected.abs().max()


def test_what_a_prompt_becomes_does_not_depend_on_those_beside_it(folder: Path) -> None:
    encoder = WanTextEncoder.load(folder)
    together = encoder.encode(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        assert digest_of(together[i]) == digest_of(encoder.encode([prompt])[0])


def test_prompts_are_cleaned_as_the_original_code_does() -> None:
    assert cleaned(PROMPTS[2]) == '"café" 42!'
    assert cleaned("  a\tb \n c ") == "a b c"


def test_signatures_tell_prompts_apart_that_the_encoder_does(folder: Path) -> None:
    tokens = WanTokens.load(folder)
    assert tokens.signature("a  red circle ") == tokens.signature("a red circle")
    assert tokens.signature("a red circle") != tokens.signature("a red square")


def test_without_ftfy_the_error_says_how_to_get_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(ValueError, match=r"cleaned by ftfy: pip install 'ddrl\[models\]'"):
        WanTokens.load(folder).ids("a")


def test_an_encoder_of_another_width_is_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "pipeline")
    config = tmp_path / "pipeline" / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "text_dim": 30}))
    with pytest.raises(ValueError, match="text_encoder has 32 channels, the network's text_dim is 30"):
        WanTextEncoder.load(tmp_path / "pipeline")
