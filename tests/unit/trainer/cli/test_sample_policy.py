"""`ddrl sample` draws with the policy that was named, and says which."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app

ROOT = Path(__file__).parents[4]
BASE = ROOT / "recipes" / "glyph-base"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with exports of two steps, and an average."""
    folder = tmp_path / "runs" / "x"
    for name in ("step-000002", "step-000004", "step-000004-ema"):
        shutil.copytree(BASE, folder / "exports" / name)
        (folder / "exports" / name / "provenance.json").unlink(missing_ok=True)
    shutil.copy(ROOT / "recipes" / "glyph-ocr.yaml", folder / "config.yaml")
    return folder


@pytest.mark.parametrize(
    ("named", "options", "export", "weights"),
    [
        ("", (), "step-000004", "raw"),
        ("config.yaml", (), "step-000004", "raw"),
        ("", ("--ema",), "step-000004-ema", "ema"),
        ("exports/step-000002", (), "step-000002", "raw"),
    ],
)
def test_a_run_is_sampled_from_its_export(run: Path, tmp_path: Path, named: str, options: tuple[str, ...], export: str, weights: str) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out"
    prompts.write_text('a sign that says "407"\n')
    done = CliRunner().invoke(app, ["sample", str(run / named), "--prompts", str(prompts), "--steps", "2", "--out", str(out), *options])
    assert done.exit_code == 0, done.stderr
    step = int(export.split("-")[1])
    assert f"policy {run / 'exports' / export}: {weights} weights of step {step}" in done.stdout.replace("\n", " ")
    line = json.loads((out / "samples.jsonl").read_text())
    assert (line["policy"], line["step_of_policy"], line["weights"]) == (str(run / "exports" / export), step, weights)


def test_a_run_without_an_export_draws_nothing(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "exports")
    (run / "lock").touch()
    for named in (run, run / "config.yaml"):
        done = CliRunner().invoke(app, ["sample", str(named), "--prompts", "none.txt", "--out", str(tmp_path / "out")])
        assert (done.exit_code, "holds no exported policy yet" in done.stderr) == (2, True)


def test_a_policy_whose_recipe_is_of_an_older_ddrl_is_drawn_with_its_sampler(tmp_path: Path) -> None:
    """Sections that say nothing of drawing may hold keys that are gone."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "policy"
    prompts.write_text('a sign that says "407"\n')
    shutil.copytree(BASE, folder)
    recipe = "name: old\nsampler: {eval_steps: 2, height: 16, width: 48}\nevaluation: {threads: 2}\nlearner: {gone: 1}\n"
    (folder / "provenance.json").write_text(json.dumps({"recipe": recipe, "step": 7, "weights": "ema"}))
    done = CliRunner().invoke(app, ["sample", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    line = json.loads((tmp_path / "out" / "samples.jsonl").read_text())
    assert (line["steps"], line["height"], line["width"], line["step_of_policy"], line["weights"]) == (2, 16, 48, 7, "ema")


def test_a_policy_of_rollouts_without_noise_is_drawn(tmp_path: Path) -> None:
    """Its sampler belongs to its objective: neither is read without the other."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "policy"
    prompts.write_text('a sign that says "407"\n')
    shutil.copytree(BASE, folder)
    recipe = "name: nft\nsampler: {eval_steps: 2, height: 16, width: 48, noise_on: none}\nobjective: {preset: diffusion_nft}\n"
    (folder / "provenance.json").write_text(json.dumps({"recipe": recipe, "step": 7, "weights": "raw"}))
    done = CliRunner().invoke(app, ["sample", str(folder), "--prompts", str(prompts), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
