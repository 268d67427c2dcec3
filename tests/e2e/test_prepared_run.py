"""A whole run on data that the policy drew beforehand: its latents are the anchor, its captions the prompts."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pipeline import ROOT, Run, check_ledger, command, records, settings


@pytest.mark.long
def test_a_run_trains_on_presampled_data(start: Callable[..., Run], tmp_path: Path) -> None:
    drawn = tmp_path / "set"
    line = command("presample", "recipes/glyph-ocr.yaml", "--out", str(drawn), "--prompts", "400", "--per-prompt", "2", "--steps", "4")
    subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=300, check=True)
    run = start("run", *settings("data.kind=prepared", f"data.path={drawn}", "updates=2", "data.pairing=own"))
    code, out, err = run.finish()
    assert code == 0, (out, err)
    check_ledger(run.folder, 2)
    losses = [record["data_loss"] for record in records(run.folder, "update")]
    assert len(losses) == 2
    assert all(loss > 0 for loss in losses)
    assert [record for record in records(run.folder, "evaluation") if record["diffusion_loss"] > 0]


@pytest.mark.long
def test_a_set_of_another_codec_costs_a_run_neither_its_name_nor_its_folder(start: Callable[..., Run], tmp_path: Path) -> None:
    drawn = tmp_path / "set"
    line = command("presample", "recipes/glyph-ocr.yaml", "--out", str(drawn), "--prompts", "400", "--per-prompt", "1", "--steps", "2")
    subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=300, check=True)
    manifest = drawn / "prepared.json"
    manifest.write_text(manifest.read_text().replace('"codec": "pixels"', '"codec": "0a0b"'))
    run = start("run", *settings("data.kind=prepared", f"data.path={drawn}"))
    code, _, err = run.finish()
    assert code == 2
    assert "were made by another codec (0a0b" in err
    assert len(err.splitlines()) == 1
    assert not run.folder.exists()
