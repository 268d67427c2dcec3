"""Encoder actors without Ray: what one answers, and that an answer is the policy's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from actors.anchor import AnchorFeeder, AnchorSpec
from actors.config import DataConfig, EncoderConfig
from actors.encoding import Encoder
from diffusion.checkpoint import load_policy, load_text_encoder
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.families.conditioning import Conditioning
from diffusion.families.sd3.tiny import write_tiny

PROMPTS = ["a red circle", "", "the cat", "a red circle", "an 42"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    folder = tmp_path_factory.mktemp("sd3") / "pipeline"
    write_tiny(folder)
    return ModelConfig(path=str(folder), t5_tokens=16)


def test_an_encoder_answers_what_the_policys_own_encoder_says(model: ModelConfig) -> None:
    own = load_text_encoder(Path(model.path), model)
    encoder = Encoder(model, EncoderConfig(actors=1))
    found = encoder.encode(PROMPTS)
    expected = own.encode(PROMPTS)
    assert all(torch.equal(found[name], value) for name, value in expected.tensors.items())
    again = encoder.encode(PROMPTS[::-1])
    assert all(torch.equal(again[name], value.flip(0)) for name, value in found.items())
    assert encoder.signature("a cat") == own.signature("a cat") != encoder.signature("the cat")


def test_a_prompt_that_does_not_fit_is_refused_by_name(policy_folder: Path) -> None:
    encoder = Encoder(ModelConfig(path=str(policy_folder), init=True), EncoderConfig(actors=1))
    with pytest.raises(ValueError, match='sign that says "0123456789"'):
        encoder.encode(['a sign that says "0123456789"'])


class NoLedger:
    def buffer(self) -> None:
        return None


class Counting:
    """A text encoder that remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def encode(self, prompts: list[str]) -> Conditioning:
        self.asked += prompts
        return Conditioning({"prompt_embeds": torch.ones(len(prompts), 3, 4), "pooled": torch.ones(len(prompts), 5)})

    def prefetch(self, prompts: Sequence[str]) -> None:
        self.encode(list(prompts))

    def signature(self, prompt: str) -> bytes:
        return prompt.encode()


def test_whoever_is_given_an_encoder_loads_none(model: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("text encoders were loaded")

    monkeypatch.setattr("diffusion.checkpoint.load_text_encoder", refuse)
    given = Counting()
    assert load_policy(model, encoder=given).text_encoder is given
    feeder = AnchorFeeder(AnchorSpec(0, model, SamplerConfig(height=16, width=48), DataConfig(), 2, NoLedger(), given))  # type: ignore[arg-type]
    assert given.asked == list(feeder.make(0).texts)  # before a rank asks for them
