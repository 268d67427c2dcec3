"""docs/rewards/videoalign.md: its settings, its YAML and its Python are those of the code."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from services.scorers.registry import parse_reward
from services.scorers.settings import RewardSettings
from services.scorers.videoalign import convert as module
from services.scorers.videoalign import tiny
from services.scorers.videoalign.config import VideoAlignConfig
from services.scorers.videoalign.scorer import VideoAlignScorer
from tests.unit.services.scorers.videoalign.conftest import DIMS

ROOT = Path(__file__).resolve().parents[5]
PAGE = (ROOT / "docs" / "rewards" / "videoalign.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)
    assert found
    return found.group(1)


def test_the_table_lists_every_setting_of_its_own() -> None:
    own = {name for name, field in VideoAlignConfig.model_fields.items() if repr(RewardSettings.model_fields.get(name)) != repr(field)} - {"kind"}
    assert set(re.findall(r"^\| `(\w+)` \| [^|]+\| ", PAGE, re.MULTILINE)) - set(VideoAlignScorer.sub_scores) - {"path"} == own - {"path"}
    assert "| `path` | |" in PAGE


def test_the_sub_scores_are_described() -> None:
    assert all(f"| `{name}` |" in PAGE for name in VideoAlignScorer.sub_scores)


def test_the_yaml_is_a_valid_reward() -> None:
    (entry,) = yaml.safe_load(block("yaml"))["rewards"].values()
    assert isinstance(parse_reward(entry), VideoAlignConfig)


def test_the_python_converts(tmp_path: Path, published: Path, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With the tiny checkpoint in place of the public one, hence its base and its template's hash."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "VideoReward").symlink_to(published)
    whole: Callable[..., module.ConvertReport] = module.convert
    monkeypatch.setattr(module, "convert", lambda *paths: whole(*paths, base=base, template_sha256=tiny.TEMPLATE_SHA256))
    exec(block("python"), {})
    assert "113 tensors" in capsys.readouterr().out
    assert (tmp_path / "videoreward-bf16" / "videoalign.json").is_file()


def test_the_command_converts(tmp_path: Path, base: Path, tensors: dict[str, torch.Tensor]) -> None:
    """With the tiny checkpoint, hence its base; without a template beside it, which is not the public one."""
    tiny.write_checkpoint(tmp_path / "VideoReward", DIMS, tensors)
    (tmp_path / "VideoReward" / "prompt_template.txt").unlink()
    program, *arguments = shlex.split(block("sh"))
    assert program == "ddrl"
    command = [sys.executable, "-m", "trainer", *arguments, "--base", str(base)]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "70 tensors" in done.stdout
    assert (tmp_path / "videoreward-bf16" / "videoalign.json").is_file()
