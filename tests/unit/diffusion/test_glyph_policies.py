"""The committed policy of the glyph world in motion: what the code writes, whole, small, and equal to diffusers' network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from diffusion.checkpoint import load_policy, save_policy
from diffusion.config import ModelConfig
from diffusion.families.glyph.policy import CLIPS, write_skeleton

COMMITTED = Path(__file__).resolve().parents[3] / "recipes" / "glyph-video-base"
PROMPT = 'the number "407" moving left'


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The policy with random weights, none of them zero."""
    state = load_policy(ModelConfig(path=str(COMMITTED), init=True)).transformer.state_dict()
    g = torch.Generator().manual_seed(0)
    folder = tmp_path_factory.mktemp("policy") / "drawn"
    save_policy(folder, COMMITTED, {name: tensor + 0.05 * torch.randn(tensor.shape, generator=g) for name, tensor in state.items()})
    return folder


def test_the_committed_folder_is_the_skeleton_the_code_writes(tmp_path: Path) -> None:
    write_skeleton(tmp_path, CLIPS)
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        assert json.loads((COMMITTED / name).read_text()) == json.loads((tmp_path / name).read_text()), name
    here, there = (load_file(f / "text_encoder" / "model.safetensors") for f in (COMMITTED, tmp_path))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[k], there[k]) for k in here)


def test_it_is_small_and_its_parts_fit() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= 8_000_000
    policy = load_policy(ModelConfig(path=str(COMMITTED), init=True))
    assert policy.codec.video
    assert policy.codec.latent_shape(12, 32, 5) == (3, 5, 12, 32)
    assert policy.transformer.tokens((3, 5, 12, 32)) == 5 * 3 * 8
    torch.testing.assert_close(policy.process.time_grid(2)[1], torch.tensor(CLIPS.shift / (1 + CLIPS.shift)))


def test_it_opens_in_diffusers_with_the_same_velocity(drawn: Path) -> None:
    theirs = WanTransformer3DModel.from_pretrained(drawn, subfolder="transformer").eval()
    policy = load_policy(ModelConfig(path=str(drawn)))
    text = policy.text_encoder.encode([PROMPT, 'the number "22" moving up'])
    x, t = torch.randn(2, 3, 5, 12, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        expected = theirs(hidden_states=x, timestep=1000 * t, encoder_hidden_states=text.prompt_embeds, return_dict=False)[0]
        found = policy.transformer.eval()(x, t, **text.tensors)
    assert isinstance(found, torch.Tensor)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("given", [1, 2])
def test_its_first_frames_can_be_given(given: int, drawn: Path) -> None:
    """Every frame has patches of its own, so that the network that samples whole clips samples what follows given frames."""
    policy = load_policy(ModelConfig(path=str(drawn)))
    text = policy.text_encoder.encode([PROMPT])
    g = torch.Generator().manual_seed(0)
    frames, free = torch.randn(1, 3, given, 12, 32, generator=g), torch.randn(1, 3, 5 - given, 12, 32, generator=g)
    with torch.no_grad():
        found = policy.transformer.eval()(free, torch.tensor([0.5]), **text.tensors, given=frames)
        other = policy.transformer(free, torch.tensor([0.5]), **text.tensors, given=frames.flip(-1))
    assert isinstance(found, torch.Tensor)
    assert found.shape == free.shape
    assert not torch.allclose(found, other)
