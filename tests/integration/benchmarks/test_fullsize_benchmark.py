"""The benchmark at full size, with a tiny policy: it writes what loads, runs one update, and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.random_policy import NAME, write_policy
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.families.sd3.tiny import write_tiny
from tests.pipeline import ROOT
from trainer.plan.published import PUBLISHED

PARTS = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    write_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_random_policy_has_the_published_layout_and_loads(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of a tiny one in the published ones' place."""
    sizes = {part: json.loads((tiny / part / "config.json").read_text()) for part in PARTS}
    monkeypatch.setitem(PUBLISHED, NAME, sizes)
    monkeypatch.setattr("benchmarks.random_policy.HEADS", {})
    write_policy(tmp_path / "policy")
    here, there = ({p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "policy", tiny))
    assert here == there | {"written.json"}
    policy = load_policy(ModelConfig(path=str(tmp_path / "policy")))
    text = policy.text_encoder.encode(["a cat", "the red circle"])
    assert text.prompt_embeds.isfinite().all()
    assert not text.prompt_embeds[0].equal(text.prompt_embeds[1])
    written = (tmp_path / "policy" / "written.json").stat().st_mtime_ns
    write_policy(tmp_path / "policy")  # whole already
    assert (tmp_path / "policy" / "written.json").stat().st_mtime_ns == written


@pytest.mark.long
def test_one_update_is_made_and_measured(tiny: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks.fullsize", "--json", "--policy", str(tiny), "--folder", str(tmp_path / "work")]
    done = subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for role in ("learner rank", "generator", "encoder"):
        of = found["memory"][role]
        assert 0 < of["mapped"] < of["resident"]
        assert of["plan"] > 0
    assert found["update"]["grad_norm"] > 0
    assert found["update"]["zero_variance_groups"] < 2  # sharpness varies
    assert found["seconds"]["first update finished after"] > 0
