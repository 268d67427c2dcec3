"""Totals of several scores: the worked example, clips, missing parts, numbers beyond a float."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.errors import ProblemError
from services.rest.combining import combine_items, terms
from services.rest.schemas import Combine, CombinedScore

OCR = ModelInfo(name="ocr", revision="r", media=["image"], reward="strict", sub_scores=["strict", "flow_grpo"])
ALIGN = ModelInfo(name="videoalign", revision="r", media=["video"], reward="overall", sub_scores=["overall", "vq", "mq"])
INFOS = {"ocr": OCR, "videoalign": ALIGN}
Result = ItemScore | ScoreFailure
Span = tuple[float, float] | None


def total(combine: Combine, ocr: Result, align: Result) -> CombinedScore:
    (item,) = combine_items(combine, terms(combine, INFOS), {"ocr": [ocr], "videoalign": [align]}, 1)
    return item


def align(vq: float, mq: float, overall: float = 0.0) -> ItemScore:
    return ItemScore(overall, {"overall": overall, "vq": vq, "mq": mq})


def test_the_worked_example() -> None:
    combine = Combine(weights={"ocr": 0.8, "videoalign.vq+mq": 0.1}, clip={"videoalign.vq+mq": (-5, 5)})
    item = total(combine, ItemScore(0.5, {"strict": 0.5}), align(4, 3))
    assert item.parts == {"ocr": 0.5, "videoalign.vq+mq": 5}
    assert item.total == pytest.approx(0.9)
    assert total(combine.model_copy(update={"total_clip": (0, 0.6)}), ItemScore(0.5, {}), align(4, 3)).total == 0.6


def test_a_missing_part_is_no_zero() -> None:
    combine = Combine(weights={"ocr": 1.0, "videoalign": 1.0})
    score, busy, wrong = ItemScore(1.0, {}), ScoreFailure("queue_full", "m", True), ScoreFailure("no_quoted_text", "m")
    for ocr, other, retryable in ((busy, align(0, 0), True), (score, busy, True), (wrong, busy, False)):
        item = total(combine, ocr, other)
        assert item.total is None
        assert item.error is not None
        assert (item.error.code, item.error.retryable) == ("part_failed", retryable)
    alone = Combine(weights={"ocr": 2.0})
    assert total(alone, score, busy).total == 2.0


@pytest.mark.parametrize("name", ["", "other", "ocr.", "ocr.vq", "ocr.strict+", "videoalign.vq+nope", "ocr.strict.x"])
def test_unknown_parts_are_refused(name: str) -> None:
    with pytest.raises(ProblemError) as refused:
        terms(Combine(weights={name: 1.0}), INFOS)
    assert refused.value.status == 422


def test_what_is_beyond_a_float_is_an_error() -> None:
    for weight, value in ((1e308, 1e308), (-1e308, 1e308)):
        item = total(Combine(weights={"videoalign": weight}), ItemScore(0.0, {}), align(0, 0, value))
        assert item.error is not None
        assert item.error.code == "not_finite"
    huge = Combine(weights={"videoalign.vq+mq": 1.0})
    assert total(huge, ItemScore(0.0, {}), align(1.7e308, 1.7e308)).error is not None
    assert total(huge.model_copy(update={"clip": {"videoalign.vq+mq": (-1.0, 1.0)}}), ItemScore(0.0, {}), align(1.7e308, 1.7e308)).total == 1.0


numbers = st.floats(-100, 100)
spans = st.tuples(numbers, numbers).map(sorted).map(tuple)


@given(numbers, numbers, numbers, numbers, st.none() | spans, st.none() | spans)
def test_totals_are_clipped_weighted_sums(
    a: float, b: float, wa: float, wb: float, clip: tuple[float, float] | None, outer: tuple[float, float] | None
) -> None:
    combine = Combine(weights={"ocr": wa, "videoalign.vq": wb}, clip={"ocr": clip} if clip else {}, total_clip=outer)
    item = total(combine, ItemScore(a, {}), align(b, 0))
    part = a if clip is None else min(max(a, clip[0]), clip[1])
    expected = wa * part + wb * b
    assert item.total is not None
    assert math.isclose(item.total, expected if outer is None else min(max(expected, outer[0]), outer[1]), abs_tol=1e-9)
