"""What the rewards say of held-out samples: scores as they come, columns and means at the end. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.rewards import RunRewards
from services.contract import ItemScore, ScoreFailure

Column = list[float | None]
"""One number per prompt; None where the reward failed."""
Scores = Mapping[str, Sequence[ItemScore | ScoreFailure]]
"""By reward, in the order of the samples."""


class EvaluationFailed(Exception):
    """A reward scored none of the held-out samples, or no generator answered; the message says why."""


@dataclass(frozen=True)
class Judgement:
    """What the rewards say of held-out samples: `values` by term, `subs` by `reward.sub_score`, why the first of each failed."""

    values: dict[str, Column]
    subs: dict[str, Column]
    first_failure: dict[str, str]
    revisions: dict[str, str]

    def record(self) -> dict[str, Any]:
        """Means of the columns without a gap: an average over the rest would be another number. And what failed."""
        failed = {name: sum(v is None for v in column) for name, column in self.values.items()}
        return {
            "rewards": _means(self.values),
            "sub_scores": _means(self.subs),
            "failed": {name: count for name, count in failed.items() if count},
            "first_failure": self.first_failure,
            "revisions": self.revisions,
        }


def _means(columns: dict[str, Column]) -> dict[str, float]:
    whole = {name: [v for v in column if v is not None] for name, column in columns.items()}
    return {name: float(np.mean(values)) for name, values in whole.items() if values and len(values) == len(columns[name])}


def judged(rewards: RunRewards, parts: Sequence[Scores], revisions: dict[str, str]) -> Judgement:
    """Columns from the scores of every reward, of all parcels in the order of their samples. Raises EvaluationFailed when a reward has no
    score at all."""
    subs: dict[str, Column] = {}
    first: dict[str, str] = {}
    scores = {name: [score for part in parts for score in part[name]] for name in rewards.names}
    for name, items in scores.items():
        failed = [s for s in items if isinstance(s, ScoreFailure)]
        if failed:
            first[name] = f"{failed[0].code}: {failed[0].message}"
        if len(failed) == len(items):
            raise EvaluationFailed(f"reward {name} scored none of {len(items)} held-out samples; first: {first[name]}")
        for sub in next(s for s in items if isinstance(s, ItemScore)).sub_scores:
            subs[f"{name}.{sub}"] = [s.sub_scores[sub] if isinstance(s, ItemScore) else None for s in items]
    values: dict[str, Column] = {t.name: [t.value(s) if isinstance(s, ItemScore) else None for s in scores[t.reward]] for t in rewards.terms}
    return Judgement(values, subs, first, revisions)
