"""`ddrl doctor` on this machine: whatever it finds, lines, JSON and exit status agree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.doctor.finding import Finding, worst

ROOT = Path(__file__).resolve().parents[4]


def test_this_machine_and_the_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["doctor", "recipes/glyph-ocr.yaml", "--no-try", "--json"])
    found = [Finding(**each) for each in json.loads(result.stdout)]
    assert result.exit_code == (1 if worst(found) == "problem" else 0)
    assert {"python", "packages", "torch", "gpus", "xformers", "memory", "open files", "redis-server", "hub token", "leftovers", "plan"} <= {
        f.check for f in found
    }
    (attention,) = [f.found for f in found if f.check == "attention float32"]
    assert attention.startswith("auto takes ")
    assert "torch_varlen: " in attention


def test_a_recipe_that_cannot_be_read_is_a_problem() -> None:
    result = CliRunner().invoke(app, ["doctor", "recipes/glyph-ocr.yaml", "--set", "updtes=1"])
    assert result.exit_code == 1
    assert "PROBLEM  recipe" in result.stdout
    assert "unknown key 'updtes'; did you mean 'updates'?" in result.stdout
    assert result.stdout.splitlines()[-1].endswith("problem")
