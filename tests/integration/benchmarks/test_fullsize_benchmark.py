"""The benchmark at full size, with a tiny policy: it writes what loads, runs one update, and says what it took."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.random_policy import ARCHITECTURES, write_policy
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from tests.pipeline import ROOT
from trainer.plan.published import PUBLISHED


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def tiny(model: str, tmp_path: Path) -> Path:
    ARCHITECTURES[model].write_tiny(tmp_path / "tiny")
    return tmp_path / "tiny"


def test_a_random_policy_has_the_published_layout_and_loads(model: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the sizes of a tiny one in the published ones' place."""
    architecture = ARCHITECTURES[model]
    sizes = {part: json.loads((tiny / part / "config.json").read_text()) for part in PUBLISHED[architecture.name]}
    sizes = {part: values[architecture.within[part]] if part in architecture.within else values for part, values in sizes.items()}
    monkeypatch.setitem(PUBLISHED, architecture.name, sizes)
    write_policy(tmp_path / "policy", replace(architecture, more={}))
    here, there = ({p.relative_to(f).as_posix() for p in f.rglob("*") if p.is_file()} for f in (tmp_path / "policy", tiny))
    assert here == there | {"written.json"}
    policy = load_policy(ModelConfig(path=str(tmp_path / "policy")))
    text = policy.text_encoder.encode(["a cat", "the red circle"])
    assert text.prompt_embeds.isfinite().all()
    assert not text.prompt_embeds[0].equal(text.prompt_embeds[1])
    written = (tmp_path / "policy" / "written.json").stat().st_mtime_ns
    write_policy(tmp_path / "policy", replace(architecture, more={}))  # whole already
    assert (tmp_path / "policy" / "written.json").stat().st_mtime_ns == written


@pytest.mark.long
def test_one_update_is_made_and_measured(model: str, tiny: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "benchmarks.fullsize", "--json", "--model", model, "--policy", str(tiny), "--folder", str(tmp_path / "work")]
    done = subprocess.run(arguments, cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for role in ("learner rank", "generator", "encoder"):
        of = found["memory"][role]
        assert 0 < of["mapped"] < of["resident"]
        assert of["plan"] > 0
    assert found["update"]["grad_norm"] > 0
    assert found["update"]["zero_variance_groups"] < 2  # one of its rewards varies
    assert found["seconds"]["first update finished after"] > 0
