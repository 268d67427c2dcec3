"""The ways of docs/rewards/videoalign.md to make a reward of VideoAlign's three scores: each is a recipe's, and means what the page says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.contract import ItemScore
from services.scorers.videoalign.scorer import VideoAlignScorer
from services.terms import Term as Name
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.advantages import Term, advantages_of

PAGE = Path(__file__).resolve().parents[4] / "docs" / "rewards" / "videoalign.md"
SECTION = PAGE.read_text().partition("## In a run's own fleet")[2].partition("\n## ")[0]
WAYS: list[dict[str, Any]] = [yaml.safe_load(cell) for cell in re.findall(r"^\| `(\{.*?\}\}|\{.*?\{\}\})` \|", SECTION, re.MULTILINE)]
JUDGED = [(0.5, -0.2, 0.1), (1.5, -1.0, 0.3), (-0.4, 0.6, 2.0), (0.0, 0.2, -1.2)]
"""VQ, MQ, TA of a group's members."""


def item(vq: float, mq: float, ta: float) -> ItemScore:
    total = vq + mq + ta
    return ItemScore(total, {"vq": vq, "mq": mq, "ta": ta, "overall": total, "overall_mean": total / 3})


def recipe(rewards: dict[str, Any]) -> RunConfig:
    return parse_config({"rewards": rewards, "fleet": {"rewards": {"videoalign": {"kind": "videoalign", "path": "/m", "device": "cuda", "gpus": 0.3}}}})


def advantages(rewards: dict[str, Any], judged: list[tuple[float, float, float]]) -> list[float]:
    config = recipe(rewards)
    scores = {name: [Name.parse(name).value(item(*one)) for one in judged] for name in config.rewards}
    terms = {name: Term(term.weight, term.clip) for name, term in config.rewards.items()}
    return advantages_of([scores], terms, config.objective.advantages)[0]


def test_the_page_lists_five_ways() -> None:
    names = [list(way) for way in WAYS]
    assert names == [["videoalign"], ["videoalign.vq+mq"], ["videoalign.overall_mean"], ["videoalign.vq"], ["videoalign.vq", "videoalign.mq", "videoalign.ta"]]
    assert {sub for way in WAYS for name in way for sub in Name.parse(name).subs} <= {*VideoAlignScorer.sub_scores}


def test_sum_and_mean_pull_alike_a_bound_apart() -> None:
    summed, meant = advantages(WAYS[0], JUDGED), advantages(WAYS[2], JUDGED)
    assert summed == pytest.approx(meant, abs=1e-3)
    assert summed[2] == max(summed)
    wild = [*JUDGED[:3], (4.0, 4.0, 4.0)]
    assert advantages(WAYS[0], wild) != pytest.approx(advantages(WAYS[2], wild), abs=1e-2)  # 12 is 5; 4 is 4


def test_some_of_the_three_leave_the_others_out() -> None:
    assert advantages(WAYS[1], JUDGED) == pytest.approx(advantages({"videoalign.mq+vq": {}}, [(vq, mq, 9.0) for vq, mq, _ in JUDGED]))
    assert advantages(WAYS[3], JUDGED) == pytest.approx(advantages({"videoalign.vq": {}}, [(vq, 0.0, 0.0) for vq, _, _ in JUDGED]))


def test_each_normalised_by_itself_is_not_the_sum() -> None:
    """TA, which spreads most, decides the sum; one by one the three have the same say."""
    alone = [advantages({name: {}}, JUDGED) for name in WAYS[4]]
    assert advantages(WAYS[4], JUDGED) == pytest.approx([sum(of) / 3 for of in zip(*alone, strict=True)])
    assert advantages(WAYS[4], JUDGED) != pytest.approx(advantages(WAYS[0], JUDGED), abs=0.05)
