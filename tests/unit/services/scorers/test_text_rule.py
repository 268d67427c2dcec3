"""The OCR string rules against vectors recorded from the reference implementations."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract import ScoreFailure
from services.scorers.text import EMPTY_TARGET, NO_QUOTED_TEXT, SUB_SCORES, Target, normalise, quoted_target, score_clip_text, score_text

# target, recognised lines, rewards of flow_grpo's and of cosmos-rl's OcrScorer
VECTORS = [
    ("Hello World", ["Hello World"], 1.0, 1.0),
    ("Hello World", ["HELLO", "WORLD"], 1.0, 1.0),
    ("Hello World", ["WORLD", "HELLO"], 0.2, 0.272727),
    ("Hello World", [], 0.0, 0.090909),
    ("Hello World", ["Helo Wrld"], 0.8, 0.818182),
    ("Hello World", ["xxHello Worldyyyyyyyyyyyyyyyyyyyyyyyyyyyy"], 1.0, 1.0),
    ("Hello World", ["z" * 29], 0.0, 0.090909),
    ("Hello World", ["Hello, World!"], 0.8, 0.818182),
    ("New York", ["Nev Yorkk"], 0.714286, 0.75),
    ("I", ["Nothing like It"], 1.0, 1.0),
    ("A  B", ["AB"], 1.0, 1.0),
]


def target(text: str) -> Target:
    found = quoted_target(f'a shop sign that says "{text}" at night, not "OTHER"')
    assert isinstance(found, Target)
    return found


@pytest.mark.parametrize(("text", "lines", "flow_grpo", "cosmos"), VECTORS)
def test_acceptance_6_vectors_of_both_references(text: str, lines: list[str], flow_grpo: float, cosmos: float) -> None:
    asked = target(text)
    assert score_text(asked, lines).reward == pytest.approx(flow_grpo, abs=5e-7)
    assert score_text(asked, lines, "cosmos").reward == pytest.approx(cosmos, abs=5e-7)


def test_the_mode_picks_the_reward_and_all_sub_scores_are_there() -> None:
    for mode in ("flow_grpo", "cosmos", "strict"):
        for score in (score_text(target("407"), ["40"], mode), score_clip_text(target("407"), [["40"], []], mode)):
            assert tuple(score.sub_scores) == SUB_SCORES
            assert score.reward == score.sub_scores[mode]


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
    assert quoted_target('says "Open Late') == Target("openlate", 9)


def test_only_plain_spaces_are_removed() -> None:
    assert normalise("A\tb\u00a0 C-É") == "a\tb\u00a0c-é"


def test_superset_text_is_seen_by_the_other_sub_scores() -> None:
    score = score_text(target("407"), ["x407yz"])
    assert score.reward == 1.0
    assert score.sub_scores["exact_match"] == 0.0
    assert score.sub_scores["strict"] == pytest.approx(0.5)
    assert score.sub_scores["character_iou"] == pytest.approx(0.5)
    assert score.text == "x407yz"


def test_swapped_words_keep_their_characters() -> None:
    score = score_text(target("Hello World"), ["WORLD", "HELLO"])
    assert score.sub_scores["character_iou"] == 1.0
    assert score.sub_scores["strict"] == pytest.approx(0.2)


def test_a_clip_scores_the_mean_of_its_positive_frames() -> None:
    """The reference skips frames that scored 0, so one good frame of many is enough; strict takes the worst."""
    score = score_clip_text(target("407"), [[], ["407"], ["47"], ["xyz"]])
    assert score.sub_scores["flow_grpo"] == pytest.approx((1 + 2 / 3) / 2)
    assert score.sub_scores["cosmos"] == score.sub_scores["flow_grpo"]
    assert score.sub_scores["strict"] == 0.0
    assert score_clip_text(target("407"), [["407"]] * 3).sub_scores["strict"] == 1.0
    assert score_clip_text(target("407"), [[], []]).reward == 0.0


def test_a_clip_has_no_substring_exemption() -> None:
    assert score_clip_text(target("407"), [["4071"]]).reward == pytest.approx(2 / 3)
    assert score_text(target("407"), ["4071"]).reward == 1.0


def test_the_text_of_a_clip_is_that_of_its_worst_frame() -> None:
    assert score_clip_text(target("407"), [["407"], ["4", "8"], ["407"]]).text == "4 8"


targets = st.text(min_size=1).filter(lambda s: normalise(s) and '"' not in s and len(normalise(s)) <= len(s)).map(target)
readings = st.lists(st.text(max_size=12), max_size=4)


@given(targets, readings)
def test_bounds_and_order(asked: Target, lines: list[str]) -> None:
    subs = score_text(asked, lines).sub_scores
    assert all(0.0 <= value <= 1.0 for value in subs.values())
    assert subs["exact_match"] <= subs["flow_grpo"] <= subs["cosmos"]
    assert subs["exact_match"] <= min(subs["strict"], subs["character_iou"])
    assert set(score_text(asked, [asked.text]).sub_scores.values()) == {1.0}


@given(targets, st.lists(readings, min_size=1, max_size=4))
def test_a_clip_is_no_better_than_its_best_frame_and_strict_no_better_than_its_worst(asked: Target, frames: list[list[str]]) -> None:
    clip = score_clip_text(asked, frames).sub_scores
    each = [score_text(asked, lines).sub_scores for lines in frames]
    assert clip["flow_grpo"] <= max(s["flow_grpo"] for s in each) + 1e-12
    assert clip["strict"] == min(s["strict"] for s in each)
