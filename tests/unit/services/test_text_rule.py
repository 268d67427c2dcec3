"""The flow_grpo string rule against vectors recorded from the reference implementation."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.client.base import ScoreFailure
from services.scorers.text import EMPTY_TARGET, NO_QUOTED_TEXT, normalise, quoted_target, score_text

# target, recognised lines, reward of flow_grpo's OcrScorer
VECTORS = [
    ("Hello World", ["Hello World"], 1.0),
    ("Hello World", ["HELLO", "WORLD"], 1.0),
    ("Hello World", ["WORLD", "HELLO"], 0.2),
    ("Hello World", [], 0.0),
    ("Hello World", ["Helo Wrld"], 0.8),
    ("Hello World", ["xxHello Worldyyyyyyyyyyyyyyyyyyyyyyyyyyyy"], 1.0),
    ("Hello World", ["z" * 29], 0.0),
    ("Hello World", ["Hello, World!"], 0.8),
    ("New York", ["Nev Yorkk"], 0.714286),
    ("I", ["Nothing like It"], 1.0),
    ("A  B", ["AB"], 1.0),
]


@pytest.mark.parametrize(("target", "lines", "reward"), VECTORS)
def test_vectors(target: str, lines: list[str], reward: float) -> None:
    asked = quoted_target(f'a shop sign that says "{target}" at night, not "OTHER"')
    assert isinstance(asked, str)
    score = score_text(asked, lines)
    assert score.reward == pytest.approx(reward, abs=5e-7)
    assert score.sub_scores["flow_grpo"] == score.reward


@pytest.mark.parametrize(
    ("prompt", "code"),
    [
        ("a sign without quotes", NO_QUOTED_TEXT),
        ("a sign that says 'single'", NO_QUOTED_TEXT),
        ("a sign that says “curly”", NO_QUOTED_TEXT),
        ('a sign that says ""', EMPTY_TARGET),
        ('a sign that says "   "', EMPTY_TARGET),
    ],
)
def test_prompts_without_a_target_are_typed_failures(prompt: str, code: str) -> None:
    failure = quoted_target(prompt)
    assert isinstance(failure, ScoreFailure)
    assert failure.code == code
    assert not failure.retryable


def test_an_unclosed_quote_takes_the_rest() -> None:
    assert quoted_target('says "Open Late') == "openlate"


def test_only_plain_spaces_are_removed() -> None:
    assert normalise("A\tb\u00a0 C-É") == "a\tb\u00a0c-é"


def test_superset_text_is_seen_by_the_other_sub_scores() -> None:
    score = score_text("407", ["x407yz"])
    assert score.reward == 1.0
    assert score.sub_scores["exact_match"] == 0.0
    assert score.sub_scores["strict"] == pytest.approx(0.5)
    assert score.text == "x407yz"


@given(st.text(min_size=1).map(normalise).filter(bool), st.lists(st.text(max_size=12), max_size=4))
def test_bounds_and_order(target: str, lines: list[str]) -> None:
    score = score_text(target, lines)
    subs = score.sub_scores
    assert all(0.0 <= value <= 1.0 for value in subs.values())
    assert subs["exact_match"] <= subs["strict"]
    assert subs["exact_match"] <= subs["flow_grpo"]
    assert score_text(target, [target]).sub_scores == {"flow_grpo": 1.0, "exact_match": 1.0, "strict": 1.0}
