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
from trainer.report.comparison import comparison_table
from trainer.report.outcome import measures
from trainer.report.summary import changes, evaluation, paired, reward_against, summarise

BEFORE = {"rewards": [0.1, 0.3, 0.2, 0.4], "exact": [0.0, 0.0, 0.0, 1.0], "diffusion_loss": [1.0, 2.0, 3.0], "diversity": [0.5, 0.3]}
AFTER = {"rewards": [0.5, 0.4, 0.6, 0.5], "exact": [1.0, 0.0, 1.0, 1.0], "diffusion_loss": [1.1, 2.3, 3.2], "diversity": [0.3, 0.3]}


def store(folder: Path, step: int, values: dict[str, Any], weights: str = "raw", **more: Any) -> None:
    rewards = {"ocr": values["rewards"], "jpeg": [-v if v is not None else None for v in values["rewards"]]}
    subs = {"ocr.exact_match": values["exact"]}
    means = {name: statistics.fmean(column) for name, column in rewards.items() if None not in column}
    record: dict[str, Any] = {
        "prompts": len(values["rewards"]),
        "set": "s1",
        "revisions": {"ocr": "r1", "jpeg": "r1"},
        "rewards": means,
        "sub_scores": {name: statistics.fmean(column) for name, column in subs.items()},
        "diffusion_loss": statistics.fmean(values["diffusion_loss"]),
        "diversity": statistics.fmean(values["diversity"]),
        "per_prompt": {"rewards": rewards, "sub_scores": subs, "diffusion_loss": values["diffusion_loss"], "diversity": values["diversity"]},
    }
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / f"test-{step:06d}-{weights}.json").write_text(json.dumps(record | more))


def summary_of(folder: Path) -> dict[str, Any]:
    return summarise(
        parse_config({"name": "x", "seed": 2, "held_out_rewards": ["jpeg"], "fleet": {"rewards": {"ocr": {"kind": "ocr"}, "jpeg": {"kind": "jpeg"}}}}),
        folder,
        60,
        480,
        {"training": 12.345},
    )


def test_paired_differences_by_hand() -> None:
    mean, error = paired([1.0, 2.0, 3.0], [2.0, 2.0, 5.0])  # differences 1, 0, 2
    assert mean == 1.0
    assert error == pytest.approx(1 / math.sqrt(3))


@given(before=st.lists(st.floats(0, 1), min_size=2, max_size=20), shift=st.floats(-1, 1))
def test_pairing_removes_what_the_prompts_have_in_common(before: list[float], shift: float) -> None:
    mean, error = paired(before, [b + shift for b in before])
    assert mean == pytest.approx(shift, abs=1e-9)
    assert error == pytest.approx(0, abs=1e-9)


def test_the_loss_by_quarters_of_the_noise_levels() -> None:
    def record(losses: list[float], levels: list[float] | None) -> dict[str, Any]:
        per_prompt = {"rewards": {}, "sub_scores": {}, "diffusion_loss": losses, "diversity": [1.0, 1.0]} | ({"noise_level": levels} if levels else {})
        return {"set": "s", "per_prompt": per_prompt}

    levels = [0.1, 0.9, 0.2, 0.3, 0.4, 0.6, 0.7, 0.99]
    before = [1.0, 1.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0]
    after = [1.1, 2.0, 2.2, 2.0, 1.0, 0.5, 0.5, 1.0]
    found = changes(record(before, levels), record(after, levels))["diffusion_loss_bands"]
    least = found["least_noise"]
    assert least == pytest.approx({"before": 1.5, "after": 1.65, "change": 0.1, "stderr": 0.05 / 1.5, "ci95": least["ci95"], "pairs": 2})
    assert least["ci95"] == pytest.approx([0.1 - 1.96 * 0.05 / 1.5, 0.1 + 1.96 * 0.05 / 1.5])
    assert {name: band["change"] for name, band in found.items()} == pytest.approx({"least_noise": 0.1, "less_noise": 0, "more_noise": -0.5, "most_noise": 0.5})
    assert [(row.label, row.change) for row in measures({"diffusion_loss_bands": found})[1:5:3]] == [
        ("Loss, least noise", pytest.approx(0.1)),
        ("Loss, most noise", pytest.approx(0.5)),
    ]
    for one, two in ((None, None), (levels, None), (levels, [0.15, *levels[1:]]), ([0.3] * 8, [0.3] * 8)):
        assert "diffusion_loss_bands" not in changes(record(before, one), record(after, two))


def test_unequal_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired([1.0, 2.0], [1.0])


def test_a_summary_by_hand(tmp_path: Path) -> None:
    store(tmp_path, 0, BEFORE)
    store(tmp_path, 60, AFTER)
    store(tmp_path, 60, {**AFTER, "rewards": [0.6] * 4}, "ema")
    found = summary_of(tmp_path)
    assert (found["name"], found["seed"], found["objective"], found["updates"], found["groups"], found["prompts"]) == (
        "x",
        2,
        "ddrl (policy 1, KL 0, data 0.01)",
        60,
        480,
        4,
    )
    assert found["wall_seconds"] == {"training": 12.3}
    ocr = found["rewards"]["ocr"]
    assert (ocr["before"], ocr["after"], ocr["after_ema"]) == pytest.approx((0.25, 0.5, 0.6))
    assert (found["evaluation_set"], found["revisions"]) == ("s1", {"ocr": "r1", "jpeg": "r1"})
    assert [(name, entry["trained"]) for name, entry in found["rewards"].items()] == [("ocr", True), ("jpeg", False)]
    for entry, differences in (
        (ocr, [0.4, 0.1, 0.4, 0.1]),
        (found["rewards"]["jpeg"], [-0.4, -0.1, -0.4, -0.1]),
        (found["sub_scores"]["ocr.exact_match"], [1, 0, 1, 0]),
    ):
        change, error = statistics.fmean(differences), statistics.stdev(differences) / 2
        assert entry["gain"] == pytest.approx(change)
        assert entry["stderr"] == pytest.approx(error)
        assert entry["ci95"] == pytest.approx([change - 1.96 * error, change + 1.96 * error])
        assert entry["pairs"] == 4
    by_hand = {
        "diffusion_loss_rise": ([0.1, 0.3, 0.2], 2.0),  # relative to the mean before
        "diversity_change": ([-0.2, 0.0], 0.4),
    }
    for name, (differences, unit) in by_hand.items():
        change = statistics.fmean(differences) / unit
        error = statistics.stdev(differences) / math.sqrt(len(differences)) / unit
        assert found[name] == pytest.approx(change)
        assert found[f"{name}_stderr"] == pytest.approx(error)
        assert found[f"{name}_ci95"] == pytest.approx([change - 1.96 * error, change + 1.96 * error])


def test_a_member_without_a_score_is_left_out_of_the_pairs(tmp_path: Path) -> None:
    store(tmp_path, 0, BEFORE)
    store(tmp_path, 60, {**AFTER, "rewards": [0.5, None, 0.6, 0.5]}, failed={"ocr": 1}, first_failure={"ocr": "timeout: after 30 s"})
    found = summary_of(tmp_path)
    assert found["rewards"]["ocr"]["gain"] == pytest.approx(0.3)  # differences 0.4, 0.4, 0.1
    assert found["rewards"]["ocr"]["pairs"] == 3
    assert "after" not in found["rewards"]["ocr"]
    assert found["failed_scores"] == {"ocr": {"first_reason": "timeout: after 30 s", "after": 1}}


def test_other_prompts_of_the_same_number_are_not_paired(tmp_path: Path) -> None:
    store(tmp_path, 0, BEFORE)
    store(tmp_path, 60, AFTER, set="s2")
    found = summary_of(tmp_path)
    assert found["unpaired"] == {"all": "another evaluation set (s1, s2)"}
    assert "gain" not in found["rewards"]["ocr"]
    assert "diffusion_loss_rise" not in found


def test_another_revision_of_a_reward_is_not_paired(tmp_path: Path) -> None:
    store(tmp_path, 0, BEFORE)
    store(tmp_path, 60, AFTER, revisions={"ocr": "r2", "jpeg": "r1"})
    found = summary_of(tmp_path)
    assert found["unpaired"] == dict.fromkeys(("ocr", "ocr.exact_match"), "another revision of ocr (r1, r2)")
    assert "gain" not in found["rewards"]["ocr"]
    assert "gain" in found["rewards"]["jpeg"]
    assert "diffusion_loss_rise" in found


def test_what_was_not_evaluated_is_left_out(tmp_path: Path) -> None:
    assert summary_of(tmp_path)["rewards"] == {}
    assert not [k for k in summary_of(tmp_path) if k.startswith(("diffusion", "diversity"))]
    store(tmp_path, 0, BEFORE)
    found = summary_of(tmp_path)
    assert found["rewards"]["ocr"] == {"trained": True, "before": pytest.approx(0.25)}
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
    assert reward_against(*runs, "ocr") == pytest.approx((0.1, statistics.stdev(differences) / 2))
    assert reward_against(*runs, "pick") == "not scored in a"
    store(runs[1], 50, AFTER, set="s2")
    assert reward_against(*runs, "ocr") == "another evaluation set (s1, s2)"
    store(runs[1], 50, AFTER, revisions={"ocr": "r9"})
    assert reward_against(*runs, "ocr") == "another revision of ocr (r1, r9)"
    assert reward_against(runs[0], tmp_path / "missing", "ocr") == "no evaluation after training in missing"


def test_a_run_that_never_got_to_its_end_is_not_compared_by_its_start(tmp_path: Path) -> None:
    finished, unfinished = tmp_path / "a", tmp_path / "b"
    for run in (finished, unfinished):
        run.mkdir()
        store(run, 0, BEFORE)
    store(finished, 60, AFTER)
    assert reward_against(finished, unfinished, "ocr") == "no evaluation after training in b"


def test_the_comparison_says_what_is_not_compared(tmp_path: Path) -> None:
    runs = [tmp_path / name for name in "ab"]
    for run, revision in zip(runs, ("r1", "r2"), strict=True):
        run.mkdir()
        revisions = {"ocr": revision, "jpeg": "r1"}
        store(run, 0, BEFORE, revisions=revisions)
        store(run, 60, AFTER, revisions=revisions)
        (run / "summary.json").write_text(json.dumps(summary_of(run)))
    text = comparison_table(runs)
    ocr, jpeg, loss = text.split("\n\n")
    assert ocr.splitlines()[0] == "ocr"
    assert ocr.splitlines()[3].endswith("not compared: another revision of ocr (r1, r2)")
    assert jpeg.splitlines()[0] == "jpeg (held out)"
    assert jpeg.splitlines()[3].endswith("+0.000 (0.000)")
    assert loss.splitlines()[3].split()[-2:] == ["1.0x", "no"]
