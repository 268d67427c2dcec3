"""What unit tests of several rooms need: one thread, no deadlines, a tiny policy folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import settings

from diffusion.families.glyph.policy import write_skeleton

BASE = Path(__file__).resolve().parents[2] / "recipes" / "glyph-base"

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


@pytest.fixture
def cached_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """(hub id, snapshot) of the committed base in a hub cache of its own, without a network."""
    name, commit = "team/glyph", "89abcdef0123456789abcdef0123456789abcdef"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--team--glyph"
    shutil.copytree(BASE, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return name, repository / "snapshots" / commit
