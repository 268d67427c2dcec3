"""A codec is known by what its latents mean: configuration and weights, not by who wrote them where."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from diffusion.digests import PIXELS, codec_digest
from diffusion.source import CheckpointError

BLOCKS = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}


def write(folder: Path, seed: int = 0, scale: float = 1.5) -> Path:
    (folder / "transformer").mkdir(parents=True)
    (folder / "transformer" / "config.json").write_text("{}")
    torch.manual_seed(seed)
    AutoencoderKL(**BLOCKS, latent_channels=4, norm_num_groups=4, scaling_factor=scale).save_pretrained(folder / "vae")
    return folder


def test_a_codec_is_its_configuration_and_weights(tmp_path: Path) -> None:
    one = codec_digest(write(tmp_path / "a"))
    assert codec_digest(write(tmp_path / "b")) == one
    config = tmp_path / "b" / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"_diffusers_version": "0.1", "_name_or_path": "x"}, indent=4))
    assert codec_digest(tmp_path / "b") == one
    assert len({one, codec_digest(write(tmp_path / "c", seed=1)), codec_digest(write(tmp_path / "d", scale=0.5)), PIXELS}) == 4
    (tmp_path / "b" / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"a variant, which the hub's snapshots leave out")
    assert codec_digest(tmp_path / "b") == one
    shutil.rmtree(tmp_path / "b" / "vae")
    assert codec_digest(tmp_path / "b") == PIXELS


def test_a_folder_that_is_no_codec(tmp_path: Path) -> None:
    (write(tmp_path) / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"needs a config\.json and weights"):
        codec_digest(tmp_path)
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(OSError, match=r"config\.json"):
        codec_digest(tmp_path)


def test_what_is_no_policy_has_no_codec_and_is_not_taken_for_one_in_pixel_space(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(CheckpointError, match="is no policy folder"):
            codec_digest(folder)


def test_it_needs_no_torch() -> None:
    done = subprocess.run([sys.executable, "-c", "import sys, diffusion.digests; print('torch' in sys.modules)"], text=True, capture_output=True, timeout=60)
    assert done.stdout == "False\n"
