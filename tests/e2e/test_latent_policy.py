"""A whole run of a policy on the latents of a VAE: anchor data is encoded, rollouts are decoded, the export opens in diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel

from diffusion.checkpoint import load_policy
from diffusion.codecs import VAECodec
from diffusion.config import ModelConfig
from diffusion.families.glyph.policy import write_skeleton
from tests.pipeline import Run, check_ledger, records, settings


def write_policy(folder: Path) -> None:
    """The glyph policy with half the patch, on four latent channels of an untrained VAE of factor 2."""
    write_skeleton(folder)
    config = folder / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "in_channels": 4, "out_channels": 4, "patch_size": 2, "sample_size": 48}))
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.1).save_pretrained(folder / "vae")


@pytest.mark.long
def test_a_latent_policy_trains_and_exports(start: Callable[..., Run], tmp_path: Path) -> None:
    policy = tmp_path / "policy"
    write_policy(policy)
    run = start("run", *settings(f"model.path={policy}", "model.init=true", "updates=2"))
    code, out, err = run.finish()
    assert code == 0, (out, err)
    check_ledger(run.folder, 2)
    losses = [r["data_loss"] for r in records(run.folder, "update")]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)

    export = run.folder / "exports" / "step-000002"
    SD3Transformer2DModel.from_pretrained(export, subfolder="transformer")
    frozen = AutoencoderKL.from_pretrained(policy, subfolder="vae").state_dict()
    codec = load_policy(ModelConfig(path=str(export))).codec
    assert isinstance(codec, VAECodec)
    assert all(torch.equal(v, frozen[k]) for k, v in codec.vae.state_dict().items())
