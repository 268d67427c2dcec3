"""What `ddrl eval` is asked to evaluate, and what it refuses before anything starts."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from trainer.cli.main import app
from trainer.config.load import load_config
from trainer.config.render import render_config

ROOT = Path(__file__).resolve().parents[4]
RECIPE, BASE = ROOT / "recipes" / "glyph-ocr.yaml", ROOT / "recipes" / "glyph-base"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two exports, both the starting policy's files."""
    folder = tmp_path / "mine"
    for name in ("step-000002", "step-000010", "step-000010-ema", "step-000012.partial"):
        shutil.copytree(BASE, folder / "exports" / name)
        (folder / "exports" / name / "provenance.json").unlink()
    (folder / "config.yaml").write_text(render_config(load_config(RECIPE, [f"model.path={BASE}"])))
    return folder


def candidates(*sources: Path, every: bool = False) -> list[tuple[str, str, int]]:
    from trainer.cli.evaluate import _candidates

    return [(c.name, c.config.model.path, c.step) for c in _candidates(list(sources), every, ["evaluation.every=0"])]


def test_a_runs_newest_export_is_held_against_what_it_started_from(run: Path) -> None:
    assert candidates(run) == [("start", str(BASE), 0), ("mine-step-000010", str(run / "exports" / "step-000010"), 10)]


def test_all_exports_of_a_run(run: Path) -> None:
    names = [(name, step) for name, _, step in candidates(run, every=True)]
    assert names == [("start", 0), ("mine-step-000002", 2), ("mine-step-000010", 10), ("mine-step-000010-ema", 10)]


def test_policies_beside_a_recipe_are_held_against_its_own(run: Path, tmp_path: Path) -> None:
    """One that came from elsewhere has seen an unknown number of updates: it stands after the start, at 1."""
    other = shutil.copytree(BASE, tmp_path / "start")
    (other / "provenance.json").unlink()
    found = candidates(RECIPE, run / "exports" / "step-000002", other)
    assert found == [("start", str(BASE), 0), ("mine-step-000002", str(run / "exports" / "step-000002"), 2), ("start-2", str(other), 1)]


def test_policies_of_one_name_get_a_number(run: Path) -> None:
    assert [name for name, _, _ in candidates(run, run)] == ["start", "mine-step-000010", "mine-step-000010-2"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([RECIPE], "names its own starting policy alone; give a run, or an exported policy, beside it"),
        ([BASE, RECIPE], "does not tell its settings; name a run, an export within one, or a recipe first"),
        (["nothing", RECIPE], "recipe nothing cannot be read"),
        ([RECIPE, ROOT / "docs"], "is neither a run folder (config.yaml) nor an exported policy"),
    ],
)
def test_what_is_refused(arguments: list[object], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["eval", *map(str, arguments), "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert message in done.output
    assert not (tmp_path / "out").exists()
