"""Paired differences by hand, and summaries with and without their evaluations."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.load import parse_config
from trainer.report.summary import evaluation, objective_name, paired, reward_against, summarise

BEFORE = {"rewards": [0.1, 0.3, 0.2, 0.4], "exact": [0.0, 0.0, 0.0, 1.0], "diffusion_losses": [1.0, 2.0, 3.0], "diversity": [0.5, 0.3]}
AFTER = {"rewards": [0.5, 0.4, 0.6, 0.5], "exact": [1.0, 0.0, 1.0, 1.0], "diffusion_losses": [1.1, 2.3, 3.2], "diversity": [0.3, 0.3]}


def store(folder: Path, step: int, values: dict[str, list[float]], weights: str = "raw") -> None:
    record: dict[str, Any] = {
        "prompts": len(values["rewards"]),
        "reward": statistics.fmean(values["rewards"]),
        "exact_match": 0.25,
        "diffusion_loss": statistics.fmean(values["diffusion_losses"]),
        "diversity": statistics.fmean(values["diversity"]),
        "per_prompt": values,
    }
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / f"test-{step:06d}-{weights}.json").write_text(json.dumps(record))


def summary_of(folder: Path) -> dict[str, Any]:
    return summarise(parse_config({"name": "x", "seed": 2}), folder, 60, 480, {"training": 12.345})


def test_paired_differences_by_hand() -> None:
    mean, error = paired([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])  # differences 1, 0, 2
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))


@given(before=st.lists(st.floats(0, 1), min_size=2, max_size=20), shift=st.floats(-1, 1))
def test_pairing_removes_what_the_prompts_have_in_common(before: list[float], shift: float) -> None:
    mean, error = paired(before, [b + shift for b in before])
    assert mean == pytest.approx(shift, abs=1e-9)
    assert error == pytest.approx(0, abs=1e-9)


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


def test_a_summary_by_hand(tmp_path: Path) -> None:
    store(tmp_path, 0, BEFORE)
    store(tmp_path, 60, AFTER)
    store(tmp_path, 60, {**AFTER, "rewards": [0.6] * 4}, "ema")
    found = summary_of(tmp_path)
    assert (found["name"], found["seed"], found["objective"], found["updates"], found["groups"], found["prompts"]) == ("x", 2, "ddrl", 60, 480, 4)
    assert found["wall_seconds"] == {"training": 12.3}
    assert (found["ocr_before"], found["ocr_after"], found["ocr_after_ema"]) == pytest.approx((0.25, 0.5, 0.6))
    by_hand = {
        "ocr_gain": ([0.4, 0.1, 0.4, 0.1], 1.0),
        "exact_match_gain": ([1, 0, 1, 0], 1.0),
        "diffusion_loss_rise": ([0.1, 0.3, 0.2], 2.0),  # relative to the mean before
        "diversity_change": ([-0.2, 0.0], 0.4),
    }
    for name, (differences, unit) in by_hand.items():
        change = statistics.fmean(differences) / unit
        error = statistics.stdev(differences) / math.sqrt(len(differences)) / unit
        assert found[name] == pytest.approx(change)
        assert found[f"{name}_stderr"] == pytest.approx(error)
        assert found[f"{name}_ci95"] == pytest.approx([change - 1.96 * error, change + 1.96 * error])


def test_a_measure_the_scorer_does_not_have_is_left_out(tmp_path: Path) -> None:
    store(tmp_path, 0, {**BEFORE, "exact": []})
    store(tmp_path, 60, {**AFTER, "exact": []})
    found = summary_of(tmp_path)
    assert "ocr_gain" in found
    assert not [k for k in found if k.startswith("exact_match_gain")]


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        ({}, "ddrl"),
        ({"preset": "flow_grpo"}, "flow_grpo"),
        ({"data_weight": 0}, "ddrl (data_weight=0)"),
        ({"preset": "sft", "data_weight": 0.5, "clip": 0.1}, "sft (data_weight=0.5)"),
    ],
)
def test_an_objective_is_named_by_its_preset_and_what_differs(objective: dict[str, Any], name: str) -> None:
    assert objective_name(parse_config({"objective": objective}).objective) == name


def test_what_was_not_evaluated_is_left_out(tmp_path: Path) -> None:
    assert not [k for k in summary_of(tmp_path) if k.startswith(("ocr", "diffusion", "diversity"))]
    store(tmp_path, 0, BEFORE)
    found = summary_of(tmp_path)
    assert found["ocr_before"] == pytest.approx(0.25)
    assert not [k for k in found if "after" in k or "gain" in k or "rise" in k or "change" in k]
    assert evaluation(tmp_path, 60) is None


def test_two_runs_are_compared_prompt_by_prompt(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "ab"]
    for run in runs:
        run.mkdir()
        store(run, 0, BEFORE)
    store(runs[0], 60, AFTER)
    store(runs[1], 40, {**AFTER, "rewards": [0.6, 0.6, 0.6, 0.6]})
    differences = [0.1, 0.2, 0.0, 0.1]
    assert reward_against(*runs) == pytest.approx((0.1, statistics.stdev(differences) / 2))
    store(runs[1], 50, {**AFTER, "rewards": [0.6, 0.6]})
    assert reward_against(*runs) is None  # other prompts
    assert reward_against(runs[0], tmp_path / "missing") is None


def test_a_run_that_never_got_to_its_end_is_not_compared_by_its_start(tmp_path: Path) -> None:
    finished, unfinished = tmp_path / "a", tmp_path / "b"
    for run in (finished, unfinished):
        run.mkdir()
        store(run, 0, BEFORE)
    store(finished, 60, AFTER)
    assert reward_against(finished, unfinished) is None
