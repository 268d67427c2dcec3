"""Kinds of rewards: every built-in one has its settings and its scorer; one's own are found by module:Class."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import get_args

import pytest
from pydantic import ValidationError

from services.scorers.base import Scorer
from services.scorers.registry import BUILT_IN, UnknownKind, build_scorer, parse_reward, scorer_class, settings_class
from services.scorers.settings import RewardSettings


@pytest.mark.parametrize("kind", BUILT_IN)
def test_every_built_in_kind_is_complete(kind: str) -> None:
    settings, scorer = settings_class(kind), scorer_class(kind)
    assert get_args(settings.model_fields["kind"].annotation) == (kind,)
    assert settings.model_fields["kind"].default == kind
    assert issubclass(scorer, Scorer)
    assert scorer.name == kind
    assert all(field.description for field in settings.model_fields.values())


@pytest.mark.parametrize("kind", ["ocr", "jpeg", "scene", "motion"])
def test_rewards_without_weights_build_and_pass_their_self_test(kind: str) -> None:
    scorer = build_scorer(parse_reward({"kind": kind}))
    scorer.self_test()
    info = scorer.info("mine")
    assert info.name == "mine"
    assert info.reward in info.sub_scores
    assert len(info.preprocessing_hash) == 12


def test_a_reward_needs_a_kind_that_exists() -> None:
    for entry, says in (({}, "needs a kind"), ({"kind": 3}, "needs a kind"), ({"kind": "orc"}, r"unknown kind 'orc'.*ocr, jpeg")):
        with pytest.raises(UnknownKind, match=says):
            parse_reward(entry)


def test_a_misspelt_or_impossible_field_is_refused() -> None:
    for entry in ({"kind": "ocr", "upscal": 3}, {"kind": "jpeg", "quality": 101}, {"kind": "scene", "reward": "beauty"}, {"kind": "pickscore"}):
        with pytest.raises(ValidationError):
            parse_reward(entry)


OWN = """
from services.scorers.base import Scorer
from services.scorers.settings import RewardSettings


class Plain(Scorer):
    name, media, reward, sub_scores = "plain", ("image",), "x", ("x",)
    revision = preprocessing = "plain-1"

    def __init__(self, settings):
        self.settings = settings

    def score(self, prompts, media):
        return []

    def self_test(self):
        pass


class WithSettings(Plain):
    class Settings(RewardSettings):
        level: int = 3


class Misled(Plain):
    class Settings:
        pass


class NotAScorer:
    pass
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "own_reward_module.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_reward_module", raising=False)
    return "own_reward_module"


def test_one_s_own_scorer_is_found_by_module_and_class(own: str) -> None:
    plain = parse_reward({"kind": f"{own}:Plain", "replicas": 2})
    assert type(plain) is RewardSettings
    assert plain.replicas.max == 2
    assert type(build_scorer(plain)).__name__ == "Plain"
    settings = parse_reward({"kind": f"{own}:WithSettings", "level": 5})
    assert build_scorer(settings).settings.level == 5  # type: ignore[attr-defined]
    with pytest.raises(ValidationError):
        parse_reward({"kind": f"{own}:WithSettings", "levle": 5})


@pytest.mark.parametrize(
    ("name", "says"),
    [("Absent", "cannot be loaded"), ("NotAScorer", "not a subclass"), ("Misled", "must inherit")],
)
def test_what_is_not_a_scorer_is_refused(own: str, name: str, says: str) -> None:
    with pytest.raises(UnknownKind, match=says):
        parse_reward({"kind": f"{own}:{name}"})


def test_a_module_that_is_not_there_says_where_it_is_looked_for() -> None:
    with pytest.raises(UnknownKind, match="PYTHONPATH"):
        parse_reward({"kind": "no_such_module_at_all:Reward"})
