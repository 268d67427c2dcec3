"""`ddrl eval` of a run: its own numbers again, of every export; what is there is not made again, and nothing is mixed with other settings."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import ROOT, Run, command


def ddrl_eval(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command("eval", *map(str, arguments)), cwd=ROOT, text=True, capture_output=True, timeout=600, check=False)


def numbers(file: Path) -> dict[str, Any]:
    record = json.loads(file.read_text())
    return {key: record[key] for key in ("set", "rewards", "sub_scores", "diffusion_loss", "diversity", "scene", "per_prompt")}


@pytest.mark.long
def test_the_exports_of_a_run_have_the_numbers_that_the_run_found(start: Callable[..., Run], tmp_path: Path) -> None:
    run = start("run", "--set", "evaluation.every=0")
    assert run.finish()[0] == 0
    out = tmp_path / "out"
    done = ddrl_eval(run.folder, "--all", "--out", out)
    assert done.returncode == 0, done.stderr
    names = ["run-step-000002", "run-step-000002-ema", "run-step-000004", "run-step-000004-ema"]
    assert sorted(f.name for f in out.iterdir() if f.is_dir()) == ["redis", *names, "start"]
    own = run.folder / "eval"
    for name in names:
        assert numbers(out / name / "eval" / "test-000000-raw.json") == numbers(own / "test-000000-raw.json")
        assert (out / name / "samples" / "before.png").read_bytes() == (run.folder / "samples" / "before.png").read_bytes()
    assert numbers(out / "run-step-000004" / "eval" / "test-000004-raw.json") == numbers(own / "test-000004-raw.json")
    assert numbers(out / "run-step-000004-ema" / "eval" / "test-000004-raw.json") == numbers(own / "test-000004-ema.json")
    assert (out / "run-step-000004" / "samples" / "after.png").read_bytes() == (run.folder / "samples" / "after.png").read_bytes()
    summary, mine = (json.loads((folder / "summary.json").read_text()) for folder in (out / "run-step-000004", run.folder))
    assert summary["rewards"]["ocr"].items() <= mine["rewards"]["ocr"].items()
    assert all(name in done.stdout for name in names)
    assert all(name in (out / "report.html").read_text() for name in names)

    again = ddrl_eval(run.folder, "--all", "--out", out)
    assert again.returncode == 0
    assert "Starting" not in again.stdout
    assert again.stdout in done.stdout
    other = ddrl_eval(run.folder, "--out", out, "--set", "evaluation.test_prompts=20")
    assert other.returncode == 2
    assert "holds an evaluation with other settings (evaluation); choose another --out" in other.stderr
