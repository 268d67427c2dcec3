"""Held-out work in a real generator: the samples and losses of the version that is named, beside rollouts that notice nothing."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import DataConfig
from actors.held_out import HeldOutFailed, name_of
from actors.rollout import RolloutGenerator
from actors.sources.draws import held_out_batch, held_out_prompts
from actors.sources.example import Example
from actors.sources.glyph import GlyphSource
from actors.weights.reading import Exported
from actors.weights.shards import local_slices, write_slices
from actors.weights.store import View
from actors.weights.table import complete
from actors.weights.transport import FolderTransport, WeightsGone
from diffusion.checkpoint import load_policy
from diffusion.config import LoRAConfig, ModelConfig, SamplerConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.evaluation import diffusion_losses
from diffusion.lora import trained_weights
from diffusion.seeds import generator, key
from tests.unit.actors.local import idle_generator

SAMPLER = SamplerConfig(eval_steps=2, steps=3, trained_steps=1)
PROMPTS = held_out_prompts(GlyphSource(), "dev", 3)
EXAMPLES = [Example(prompt, prompt) for prompt in PROMPTS]
WAIT_S = 30.0


@pytest.fixture(params=["all weights", "adapter", "merged adapter"])
def model(request: pytest.FixtureRequest, policy_folder: Path) -> ModelConfig:
    lora = LoRAConfig() if request.param == "all weights" else LoRAConfig(rank=2, merge=request.param == "merged adapter")
    return ModelConfig(path=str(policy_folder), init=True, lora=lora)


def trained(model: ModelConfig, version: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(version)
    state = trained_weights(load_policy(model).transformer)
    return {name: tensor + 0.1 * torch.randn(tensor.shape, generator=g) for name, tensor in state.items()}


def published(folder: Path, model: ModelConfig, version: int) -> View:
    transport = FolderTransport(str(folder / "weights"))
    shard, objects = write_slices(transport, local_slices(trained(model, version), 0), (1, version), 0, 1)
    return View(complete([shard]), transport, objects)


def policy_with(model: ModelConfig, version: int | None) -> Any:
    policy = load_policy(model.model_copy(update={"lora": model.lora.model_copy(update={"merge": False})}))
    if version is not None:
        policy.transformer.load_state_dict(trained(model, version), strict=False)
    return policy


def rollout(made: RolloutGenerator) -> torch.Tensor:
    text = made.text.get([PROMPTS[0]])[0]
    request = SampleRequest(made.shape, 3, conditioning=text, n=2, seed=1, stochastic=frozenset({0}), trained=(0,))
    found = made.engine.submit(request).result(WAIT_S)
    return torch.stack([t.latent for t in found] + [t.x[0] for t in found])


@pytest.mark.parametrize("version", [None, 7])
def test_samples_and_losses_are_those_of_the_version(model: ModelConfig, version: int | None, tmp_path: Path) -> None:
    """None names the policy that the run started from, whatever has come since; rollouts stay those of the live weights, bit by bit."""
    made, policy = idle_generator(model, SAMPLER), policy_with(model, version)
    made.engine.set_weights(trained(model, 3), 3).result(WAIT_S)
    live = rollout(made)
    weights = None if version is None else published(tmp_path, model, version)

    images = made.sample_held_out(weights, "dev", EXAMPLES, 4, 2)
    requests = [SampleRequest(made.shape, 2, prompt=p, n=2, seed=key("evaluation", "dev"), group=4 + i, kernel="ddim_eta") for i, p in enumerate(PROMPTS)]
    engine = Engine(policy.transformer, policy.process, SAMPLER.max_tokens, text_encoder=policy.text_encoder)
    np.testing.assert_array_equal(images, policy.codec.decode(torch.stack([t.latent for t in engine.run(requests)])))
    assert images.shape == (6, 16, 48, 3)

    points = 9
    captions, pixels = held_out_batch(GlyphSource(), "dev", points, 16, 48)
    text, x0, g = policy.text_encoder.encode(captions), policy.codec.encode(pixels), generator("evaluation", "loss", "dev")
    t = (torch.arange(points) + torch.rand(points, generator=g)) / points
    level = t[torch.randperm(points, generator=g)]
    t = policy.process.spread_times(level)
    expected = diffusion_losses(policy.transformer, policy.process, x0, torch.randn(x0.shape, generator=g), t, text)
    found = [loss for first, n in ((0, 4), (4, 4), (8, 1)) for loss in made.held_out_losses(weights, "dev", points, first, n)]
    assert [loss for _, loss in found] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [at for at, _ in found] == level.tolist()
    assert torch.equal(rollout(made), live)


def test_a_version_is_read_once_and_let_go_when_nobody_asks(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(path=str(policy_folder), init=True)
    made, weights = idle_generator(model, SAMPLER), published(tmp_path, model, 7)
    first = made.sample_held_out(weights, "dev", EXAMPLES, 0, 1)
    files = list((tmp_path / "weights").rglob("*.safetensors"))
    for file in files:
        file.rename(file.with_suffix(".away"))
    np.testing.assert_array_equal(made.sample_held_out(weights, "dev", EXAMPLES, 0, 1), first)
    held = made._held_out
    assert held.holds == name_of(weights)
    monkeypatch.setattr("actors.held_out.IDLE_S", 0.1)
    made.sample_held_out(weights, "dev", EXAMPLES, 0, 1)
    deadline = time.monotonic() + WAIT_S
    while held.holds is not None or made.engine._side.engine.runner._held:  # the name goes first, then what it names
        assert time.monotonic() < deadline
        time.sleep(0.05)
    with pytest.raises(WeightsGone, match="weights of version 7 are gone"):
        made.sample_held_out(weights, "dev", EXAMPLES, 0, 1)
    for file in files:
        file.with_suffix(".away").rename(file)
    np.testing.assert_array_equal(made.sample_held_out(weights, "dev", EXAMPLES, 0, 1), first)


def test_parcels_of_several_threads_and_versions_do_not_meet(policy_folder: Path, tmp_path: Path) -> None:
    """Each waits for its turn, while rollouts go on."""
    model = ModelConfig(path=str(policy_folder), init=True)
    made = idle_generator(model, SAMPLER)
    versions = {v: published(tmp_path, model, v) for v in (7, 8)}
    alone = {v: made.sample_held_out(w, "dev", EXAMPLES, 0, 1) for v, w in versions.items()}
    live = rollout(made)
    found: list[bool] = []

    def ask(version: int) -> None:
        for _ in range(3):
            found.append(np.array_equal(made.sample_held_out(versions[version], "dev", EXAMPLES, 0, 1), alone[version]))

    threads = [threading.Thread(target=ask, args=(v,)) for v in versions]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert torch.equal(rollout(made), live)
    assert found == [True] * 6


def test_what_cannot_be_sampled_is_told_without_its_tensors(policy_folder: Path, tmp_path: Path) -> None:
    model = ModelConfig(path=str(policy_folder), init=True)
    made = idle_generator(model, SAMPLER, DataConfig())
    state = {name: torch.full_like(tensor, float("nan")) for name, tensor in trained(model, 7).items()}
    transport = FolderTransport(str(tmp_path / "weights"))
    shard, objects = write_slices(transport, local_slices(state, 0), (1, 7), 0, 1)
    with pytest.raises(HeldOutFailed, match="the sample is not finite"):
        made.sample_held_out(View(complete([shard]), transport, objects), "dev", EXAMPLES, 0, 1)
    assert len(made.sample_held_out(None, "dev", EXAMPLES, 0, 1)) == 3


def test_names_of_versions() -> None:
    assert name_of(None) != name_of(Exported(3, "a")) != name_of(Exported(3, "b"))
