"""Taking the newest policy out of a run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.cli.export import ExportError, export_run
from trainer.config.run import RunConfig
from trainer.learn.records import append_metrics
from trainer.run.folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with two exports, raw and averaged, and some metrics."""
    folder = RunFolder(tmp_path / "run")
    folder.open(RunConfig(), resume=False)
    for name in ("step-000020", "step-000020-ema", "step-000040", "step-000040-ema"):
        (folder.exports / name).mkdir(parents=True)
        (folder.exports / name / "model_index.json").write_text(name)
    for step in range(1, 1001):
        append_metrics(folder.path, {"kind": "update", "step": step, "data_loss": 1 / step})
    folder.append_evaluation({"kind": "evaluation", "step": 0, "rewards": {"ocr": 0.25}})
    folder.close()
    return folder.path


@pytest.mark.parametrize(("ema", "name"), [(False, "step-000040"), (True, "step-000040-ema")])
def test_the_newest_policy_comes_with_what_made_it(ema: bool, name: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export_run(run, out, ema) == out
    assert (out / "model_index.json").read_text() == name
    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["step"] == 40
    assert provenance["weights"] == ("ema" if ema else "raw")
    assert provenance["recipe"] == (run / "config.yaml").read_text()
    assert provenance["evaluations"] == [{"kind": "evaluation", "step": 0, "rewards": {"ocr": 0.25}}]
    assert len(provenance["data_loss"]) == 200
    assert provenance["data_loss"][1] == [6, pytest.approx(1 / 6, abs=1e-5)]


@pytest.mark.parametrize("left", ["step-000060.partial", "step-000060-ema.partial"])
@pytest.mark.parametrize("ema", [False, True])
def test_what_a_crash_left_half_written_is_not_exported(left: str, ema: bool, run: Path, tmp_path: Path) -> None:
    (run / "exports" / left).mkdir()
    export_run(run, tmp_path / "out", ema)
    assert json.loads((tmp_path / "out" / "provenance.json").read_text())["step"] == 40


def test_a_run_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="holds no exported policy; the first one is written with the first checkpoint"):
        export_run(tmp_path, tmp_path / "out", False)


def test_a_destination_that_cannot_be_written(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ExportError, match="cannot be written"):
        export_run(run, tmp_path / "file" / "out", False)
