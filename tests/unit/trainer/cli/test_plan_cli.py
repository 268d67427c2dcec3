"""`ddrl plan`: tables that fit a terminal, JSON, and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app

RECIPES = Path(__file__).resolve().parents[4] / "recipes"
SD35 = str(RECIPES / "sd35-medium-ocr.yaml")


def test_tables_fit_eighty_columns() -> None:
    for arguments in ([str(RECIPES / "glyph-ocr.yaml"), "--gpus", "0"], [SD35, "--price", "2.5"]):
        result = CliRunner().invoke(app, ["plan", *arguments])
        assert result.exit_code == 0, result.output
        assert max(map(len, result.stdout.splitlines())) <= 80
        assert result.stdout.splitlines()[-1].strip() == "fits"
        for title in ("Policy", "A learner rank", "A generator", "GPUs", "Memory of hosts", "Payloads and disk", "An update", "Assumed"):
            assert title in result.stdout


def test_json() -> None:
    result = CliRunner().invoke(app, ["plan", SD35, "--gpus", "2", "--set", "learner.ranks=2", "--set", "rollout.generators=2", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["fits"], found["gpus"], len(found["placement"]["devices"])) == (True, 2, 2)


def test_a_recipe_that_does_not_fit_says_what_would() -> None:
    result = CliRunner().invoke(app, ["plan", SD35, "--gpu", "l40s-48"])
    assert result.exit_code == 2
    assert "does not fit: a GPU would hold" in result.stderr
    assert "Nearest change: activation checkpointing (learner.recompute=true)" in result.stderr
    assert "activation checkpointing" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([SD35, "--gpu", "h100"], "ddrl: --gpu h100: not in the table; there are h100-80"),
        ([SD35, "--assume", "usabel=1"], "ddrl: --assume: unknown key 'usabel'; did you mean 'usable'?"),
        ([SD35, "--set", "model.path=no/where"], "ddrl: model.path: no/where is neither a folder nor a published policy"),
        ([SD35, "--set", "sampler.height=500"], "ddrl: sampler: 500x512 pixels are no multiple of 8"),
        ([SD35, "--set", "model.lora.targets=[nothing]"], "ddrl: built-in configuration of stabilityai/stable-diffusion-3.5-medium: model.lora.targets names"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""
