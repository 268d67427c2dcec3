"""Several scores of an item → one total: clip each part, weight it, add up, clip the sum. Pure.

Worked example: weights {ocr: 0.8, videoalign.vq+mq: 0.1}, clip {videoalign.vq+mq: [-5, 5]}; ocr 0.5, vq 4, mq 3
→ parts {ocr: 0.5, videoalign.vq+mq: 5}, total 0.8 · 0.5 + 0.1 · 5 = 0.9.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from services.contract import ItemScore, ModelInfo, ScoreFailure
from services.errors import ProblemError
from services.rest.schemas import Combine, CombinedScore, ScoreError
from services.terms import Term


def terms(combine: Combine, infos: Mapping[str, ModelInfo]) -> dict[str, Term]:
    """The parts by their names. Raises ``ProblemError`` 422 for a reward or sub-score that is not asked for or not there."""
    found: dict[str, Term] = {}
    for name in combine.weights:
        reward, dot, rest = name.partition(".")
        subs = tuple(rest.split("+")) if dot else ()
        if reward not in infos:
            raise ProblemError(422, "invalid_request", f"combine.weights names {reward[:64]!r}, which is not in rewards")
        unknown = [sub for sub in subs if sub not in infos[reward].sub_scores]
        if unknown:
            raise ProblemError(422, "invalid_request", f"{reward} has no sub-score {unknown[0][:64]!r}; there is {', '.join(infos[reward].sub_scores)}")
        found[name] = Term(name, reward, subs)
    return found


def combine_items(combine: Combine, parts: Mapping[str, Term], results: Mapping[str, Sequence[ItemScore | ScoreFailure]], count: int) -> list[CombinedScore]:
    """One total per item; an item whose parts are not all there has an error instead."""
    return [_total(combine, parts, {reward: scores[i] for reward, scores in results.items()}) for i in range(count)]


def _total(combine: Combine, parts: Mapping[str, Term], scores: Mapping[str, ItemScore | ScoreFailure]) -> CombinedScore:
    failed = {term.reward: score for term in parts.values() if isinstance(score := scores[term.reward], ScoreFailure)}
    if failed:
        message = f"no score from {', '.join(failed)}"
        return CombinedScore(error=ScoreError(code="part_failed", message=message, retryable=all(f.retryable for f in failed.values())))
    values = {name: _clipped(_value(term, scores[term.reward]), combine.clip.get(name)) for name, term in parts.items()}
    try:
        total = _clipped(math.fsum(combine.weights[name] * value for name, value in values.items()), combine.total_clip)
    except (OverflowError, ValueError):  # beyond a float, or infinities of both signs
        total = math.nan
    if not all(map(math.isfinite, (total, *values.values()))):
        return CombinedScore(error=ScoreError(code="not_finite", message="the total is not a finite number"))
    return CombinedScore(total=total, parts=values)


def _value(term: Term, score: ItemScore | ScoreFailure) -> float:
    assert isinstance(score, ItemScore)
    try:
        return term.value(score)
    except OverflowError:
        return math.inf


def _clipped(value: float, span: tuple[float, float] | None) -> float:
    return value if span is None else min(max(value, span[0]), span[1])
