"""Prompts in, pictures out, on the tiny policy with its real text encoder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.engine.generate import DiffusionEngine, SamplingParams
from diffusion.engine.request import SamplingFailed
from diffusion.source import CheckpointError

SMALL = SamplingParams(16, 48, steps=3)


@pytest.fixture
def engine(policy_folder: Path) -> Iterator[DiffusionEngine]:
    policy = load_policy(ModelConfig(path=str(policy_folder), init=True))
    with torch.no_grad():
        for i, parameter in enumerate(policy.transformer.parameters()):  # a fresh policy predicts 0 everywhere
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    with DiffusionEngine(policy) as made:
        yield made


def test_each_prompt_gets_its_samples_in_order_whatever_the_mix(engine: DiffusionEngine) -> None:
    params = [SamplingParams(16, 48, 3, n=2), SamplingParams(32, 96, 2), SamplingParams(16, 24, 5, n=3, guidance=2.0)]
    told: list[tuple[int, int]] = []
    prompts = ['a sign that says "12"', 'a sign that says "345"', 'a sign that says "12"']
    done = engine.generate(prompts, params, lambda finished, total: told.append((finished, total)))
    assert [[s.number for s in samples] for samples in done] == [[0, 1], [0], [0, 1, 2]]
    for samples, prompt, p in zip(done, prompts, params, strict=True):
        for s in samples:
            assert (s.prompt, s.params, s.image.shape, s.image.dtype) == (prompt, p, (p.height, p.width, 3), np.uint8)
            assert np.array_equal(s.image, engine.policy.codec.decode(s.trajectory.latent[None])[0])
    assert told[-1] == (6, 6)
    assert told == sorted(told)
    assert len({s.image.tobytes() for samples in done for s in samples}) == 6
    again = engine.generate(prompts[:1], params[0])
    for a, b in zip(again[0], done[0], strict=True):
        torch.testing.assert_close(a.trajectory.latent, b.trajectory.latent, atol=1e-4, rtol=1e-4)


def test_noise_draws_other_pictures_than_the_ode(engine: DiffusionEngine) -> None:
    prompt = ['a sign that says "12"']
    ode = engine.generate(prompt, SMALL)[0][0]
    sde = engine.generate(prompt, SamplingParams(16, 48, 3, stochastic="all"))[0][0]
    assert (ode.trajectory.latent - sde.trajectory.latent).abs().max() > 0.1


def test_what_cannot_be_drawn_is_refused_and_leaves_nothing_behind(engine: DiffusionEngine) -> None:
    good = 'a sign that says "12"'
    with pytest.raises(ValueError, match="quoted characters"):
        engine.generate([good, 'a sign that says "123456789"'], SMALL)
    with pytest.raises(ValueError, match="not a multiple of the patch size"):
        engine.generate([good, good], [SMALL, SamplingParams(17, 48)])
    with pytest.raises(ValueError, match="2 prompts but 1 sampling parameters"):
        engine.generate([good, good], [SMALL])
    with pytest.raises(ValueError, match="must be 'none' or 'all'"):
        SamplingParams(16, 48, stochastic="some")
    assert engine.engine.unfinished == 0
    assert len(engine.generate([good], SMALL)[0]) == 1


def test_failed_samples_are_named(engine: DiffusionEngine) -> None:
    engine.policy.transformer.proj_out.bias.data[0] = float("nan")
    with pytest.raises(SamplingFailed, match="2 of 2 samples failed"):
        engine.generate(['a sign that says "12"'], SamplingParams(16, 48, 3, n=2))


def test_a_policy_folder_is_opened_by_name(policy_folder: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no diffusion_pytorch_model"):
        DiffusionEngine.from_pretrained(str(policy_folder))
