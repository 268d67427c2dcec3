"""The commands that need no run: a person's mistake is one line and status 2."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.config.load import load_config, parse_config

RECIPE = Path(__file__).resolve().parents[4] / "recipes" / "glyph-ocr.yaml"


def test_config_prints_what_a_run_would_use() -> None:
    result = CliRunner().invoke(app, ["config", str(RECIPE), "--set", "updates=7"])
    assert result.exit_code == 0
    assert parse_config(yaml.safe_load(result.stdout)) == load_config(RECIPE, ["updates=7"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["config", "missing.yaml"], "ddrl: recipe missing.yaml cannot be read: No such file or directory"),
        (["config", str(RECIPE), "--set", "updtes=1"], "ddrl: unknown key 'updtes'; did you mean 'updates'?"),
        (["config", str(RECIPE), "--set", "updates=none"], "ddrl: updates: Input should be a valid integer"),
        (["train", str(RECIPE), "--set", "sampler.steps=1"], "ddrl: sampler.steps: Input should be greater than or equal to 2"),
        (["report", "no/such/run"], "ddrl: no such run folder: no/such/run"),
        (["export", "no/such/run", "out"], "ddrl: no/such/run holds no exported policy"),
    ],
)
def test_a_mistake_is_one_line_and_status_two(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert result.stderr.startswith(message)
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


def test_version_and_completion() -> None:
    assert CliRunner().invoke(app, ["--version"]).stdout == f"ddrl {version('ddrl')}\n"
    assert "--install-completion" in CliRunner().invoke(app, ["--help"], env={"COLUMNS": "120"}).stdout


def test_config_says_what_the_objective_really_is() -> None:
    result = CliRunner().invoke(app, ["config", str(RECIPE), "--set", "objective.kl_weight=0.5"])
    assert "# the loss: ddrl (policy 1, KL 0.5, data 0.02; the preset has data_weight 0.01, kl_weight 0)" in result.stdout
