"""The table of docs/results.md: runs with known numbers per prompt come out as the arithmetic says."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import results

PROMPTS = 4


def write_run(folder: Path, seed: int, ocr: list[float], motion: list[float], loss: float) -> Path:
    """A finished run whose rewards start at 0.5 for every prompt."""
    (folder / "eval").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({"seed": seed, "wall_seconds": {"training": 60.0}}))
    for step, rewards, losses in ((0, ([0.5] * PROMPTS, [0.5] * PROMPTS), [1.0, 1.0]), (60, (ocr, motion), [loss - 0.01, loss + 0.01])):
        per_prompt = {"rewards": dict(zip(("ocr", "motion"), rewards, strict=True)), "sub_scores": {"ocr.exact_match": rewards[0]}}
        record = {
            "step": step,
            "set": "abc",
            "prompts": PROMPTS,
            "revisions": {"ocr": "1", "motion": "1"},
            "rewards": {name: sum(values) / PROMPTS for name, values in per_prompt["rewards"].items()},
            "sub_scores": {"ocr.exact_match": sum(rewards[0]) / PROMPTS},
            "diffusion_loss": sum(losses) / 2,
            "diversity": 0.3,
            "per_prompt": {**per_prompt, "diffusion_loss": losses, "diversity": [0.3, 0.31]},
        }
        (folder / "eval" / f"test-{step:06d}-raw.json").write_text(json.dumps(record))
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    trained = write_run(tmp_path / "video-0", 0, [0.9, 0.7, 0.8, 0.6], [0.6, 0.5, 0.5, 0.6], 1.02)
    return trained, write_run(tmp_path / "control-0", 0, [0.5, 0.5, 0.6, 0.4], [0.5, 0.5, 0.5, 0.5], 1.0)


def test_the_table_of_a_reward_with_one_held_out(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained, control = runs
    monkeypatch.setattr(sys, "argv", ["results", "--held-out", "motion", "--ddrl", str(trained), "--control", str(control)])
    results.main()
    head, rule, line = capsys.readouterr().out.splitlines()
    assert head.count("|") == rule.count("|") == line.count("|")
    cells = dict(zip(head.strip("| ").split(" | "), line.strip("| ").split(" | "), strict=True))
    assert cells["run"] == "video-0"
    assert cells["ocr"] == "0.500 → 0.750"
    assert cells["gain (paired)"].startswith("+0.250 ± 0.065")
    assert cells["control's gain"].startswith("+0.000")
    assert cells["above the control (paired)"].startswith("+0.250 ± 0.050 (5.0 se)")  # of 0.4, 0.2, 0.2, 0.2
    assert cells["motion, held out; above the control"] == "0.500 → 0.550; +0.050 ± 0.029 (1.7 se)"
    assert cells["diffusion loss [95 %]"].startswith("+2.0 %")


def test_a_run_that_is_not_finished_is_refused(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    trained, _ = runs
    (trained / "eval" / "test-000060-raw.json").unlink()
    monkeypatch.setattr(sys, "argv", ["results", "--ddrl", str(trained)])
    with pytest.raises(SystemExit, match="is the run finished"):
        results.main()


def test_the_same_as_json(runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    trained, control = runs
    monkeypatch.setattr(sys, "argv", ["results", "--held-out", "motion", "--json", "--ddrl", str(trained), "--control", str(control)])
    results.main()
    (row,) = json.loads(capsys.readouterr().out)
    assert row["above_control"]["motion"] == pytest.approx([0.05, 0.05 / 3**0.5])
    assert row["held_out"]["motion"] == {"before": 0.5, "after": pytest.approx(0.55)}
