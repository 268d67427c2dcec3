"""The committed policy of the glyph world in motion: what the code writes, whole, small, and equal to diffusers' network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from safetensors.torch import load_file

from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.families.cosmos.network import GIVEN_TIME
from diffusion.families.glyph.policy import CLIPS, write_skeleton
from tests.unit.diffusion.cosmos import theirs, torchvision

COMMITTED = Path(__file__).resolve().parents[3] / "recipes" / "glyph-video-base"
PROMPT = 'the number "407" moving left'


def test_the_committed_folder_is_the_skeleton_the_code_writes(tmp_path: Path) -> None:
    write_skeleton(tmp_path, CLIPS)
    for name in ("model_index.json", "transformer/config.json", "scheduler/scheduler_config.json", "text_encoder/config.json"):
        assert json.loads((COMMITTED / name).read_text()) == json.loads((tmp_path / name).read_text()), name
    here, there = (load_file(f / "text_encoder" / "model.safetensors") for f in (COMMITTED, tmp_path))
    assert here.keys() == there.keys()
    assert all(torch.equal(here[k], there[k]) for k in here)


def test_it_is_small_and_its_parts_fit() -> None:
    assert sum(path.stat().st_size for path in COMMITTED.rglob("*") if path.is_file()) <= 8_000_000
    policy = load_policy(ModelConfig(path=str(COMMITTED)))
    assert policy.codec.video
    assert policy.codec.latent_shape(12, 32, 5) == (3, 5, 12, 32)
    assert policy.transformer.tokens((3, 5, 12, 32)) == 5 * 8
    torch.testing.assert_close(policy.process.time_grid(2)[1], torch.tensor(CLIPS.shift / (1 + CLIPS.shift)))


@pytest.mark.parametrize("given", [0, 1, 2])
def test_it_opens_in_diffusers_with_the_same_velocity(given: int) -> None:
    """Whole clips, and what follows given frames."""
    torchvision()
    model = CosmosTransformer3DModel.from_pretrained(COMMITTED, subfolder="transformer").eval()
    policy = load_policy(ModelConfig(path=str(COMMITTED)))
    text = policy.text_encoder.encode([PROMPT, 'the number "22" moving up'])
    x, t = torch.randn(2, 3, 5, 12, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.9])
    expected = torch.stack([theirs(model, *row, given, GIVEN_TIME) for row in zip(x, t, text.prompt_embeds, strict=True)])[:, :, given:]
    with torch.no_grad():
        found = policy.transformer.eval()(x[:, :, given:], t, **text.tensors, **({"given": x[:, :, :given]} if given else {}))
    assert isinstance(found, torch.Tensor)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
