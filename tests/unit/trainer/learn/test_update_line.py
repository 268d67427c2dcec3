"""The metrics line of an update: totals, scores by reward, and warnings told once."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from replay.records import Claim, ClaimedGroup, GroupHeader
from trainer.config.load import parse_config
from trainer.learn.update_line import Warnings, reward_spread, score_statistics, update_record

CONFIG = parse_config({"objective": {"clip": 1e-3}, "sampler": {"kernel": "edm_2ab", "noise_level": 1.0}})


def claim_of(*headers: GroupHeader, step: int = 4) -> Claim:
    return Claim(step, 1, [ClaimedGroup(10 + i, header, "") for i, header in enumerate(headers)], [])


def test_totals_and_staleness_of_the_claimed_groups() -> None:
    meta: dict[str, float | int | str] = {"failed_members": 1, "sample_s": 2.0, "score_s": 0.5}
    first = GroupHeader([1.0, 3.0], 2, 3, 0, "", meta, {"ocr": [1.0, 3.0]})
    claim = claim_of(first, GroupHeader([2.0, 2.0, 2.0], 3, 1, 0, "", {"sample_s": 4.0}, {"ocr": [2.0, 2.0, 2.0]}))
    record = update_record(CONFIG, claim, {"policy_loss": 0.25}, {"train": 1.23456})
    assert record == {
        "kind": "update",
        "step": 4,
        "policy_loss": 0.25,
        "reward_mean": 2.0,
        "reward_at_top": 0.2,
        "reward_quantiles": {"10": pytest.approx(1.4), "50": 2.0, "90": pytest.approx(2.6)},
        "reward_std": pytest.approx(statistics.stdev([1.0, 3.0]) / 2),
        "rewards": {"ocr": 2.0},
        "rewards_std": {"ocr": pytest.approx(statistics.stdev([1.0, 3.0]) / 2)},
        "trained_groups": [10, 11],
        "failed_members": 1,
        "valid_rate": 5 / 6,
        "zero_variance_groups": 1,
        "staleness_mean": 1.0,
        "staleness_max": 2,
        "seconds": {"train": 1.2346, "sample": 3.0, "score": 0.5},
    }
    json.dumps(record, allow_nan=False)


def test_how_the_rewards_of_an_update_lie() -> None:
    assert reward_spread([0.0, 1.0, 1.0, 0.5]) == {
        "reward_mean": 0.625,
        "reward_at_top": 0.5,
        "reward_quantiles": {"10": pytest.approx(0.15), "50": 0.75, "90": 1.0},
    }
    assert reward_spread([0.25]) == {"reward_mean": 0.25, "reward_at_top": 1.0}


def test_without_groups_there_is_nothing_to_say_about_rewards() -> None:
    assert update_record(CONFIG, claim_of(), {"data_loss": 1.0}, {}) == {"kind": "update", "step": 4, "data_loss": 1.0, "seconds": {}}


def test_scores_by_reward_with_failures() -> None:
    groups: list[Any] = [{"ocr": [0.0, 1.0], "aux": [4.0, None]}, {"ocr": [1.0, 1.0], "aux": [None, None]}, {"ocr": [0.0, 0.0], "aux": [1.0, 1.0]}]
    found = score_statistics(groups, ["ocr", "aux"])
    assert found["rewards"] == {"ocr": 0.5, "aux": 2.0}
    assert found["rewards_std"] == {"ocr": pytest.approx(statistics.stdev([0.0, 1.0]) / 3), "aux": 0.0}
    assert found["failed_scores"] == {"aux": 3}
    assert "failed_scores" not in score_statistics(groups, ["ocr"])
    assert score_statistics([{"aux": [None, None]}], ["aux"]) == {"rewards": {}, "rewards_std": {}, "failed_scores": {"aux": 2}}


def test_much_clipping_is_told_when_it_begins() -> None:
    warnings = Warnings()
    assert warnings.new(CONFIG, {"clip_fraction": 0.2}) == []
    (told,) = warnings.new(CONFIG, {"clip_fraction": 0.36})
    assert told.startswith("36 % of the probability ratios lie outside 1 ± 0.001 (kernel=edm_2ab)")
    assert "raise objective.clip" in told
    assert warnings.new(CONFIG, {"clip_fraction": 0.89}) == []  # it stays so
    assert warnings.new(CONFIG, {"clip_fraction": 0.1}) == []
    assert len(warnings.new(CONFIG, {"clip_fraction": 0.89})) == 1  # and begins again
    assert len(Warnings().new(CONFIG, {"clip_fraction": 0.89})) == 1  # a start of its own
    assert Warnings().new(CONFIG, {}) == []  # no rollouts
