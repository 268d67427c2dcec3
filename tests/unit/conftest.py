"""What unit tests of several rooms need: one thread, no deadlines, a tiny policy folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from diffusion.families.glyph.policy import write_skeleton

settings.register_profile("unit", deadline=None)  # a busy machine is not a failure
settings.load_profile("unit")


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def policy_folder(tmp_path: Path) -> Path:
    """A policy folder without weights (`model.init=true`): the glyph policy's, shrunk to one layer of width 32."""
    folder = tmp_path / "policy"
    write_skeleton(folder)
    path = folder / "transformer" / "config.json"
    small = {"num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2, "caption_projection_dim": 32}
    path.write_text(json.dumps({**json.loads(path.read_text()), **small}))
    return folder
