"""What is trained or judged: a reward, one of its sub-scores, or a sum of them, by name. Pure.

`ocr` is the reward's own number, `scene.sharpness` one sub-score, `videoalign.vq+mq` a sum.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from services.contract import ItemScore


@dataclass(frozen=True)
class Term:
    """One named number of an item: the reward itself when `subs` is empty, else the sum of those sub-scores."""

    name: str
    reward: str
    subs: tuple[str, ...] = ()

    @classmethod
    def parse(cls, name: str) -> Term:
        """From `reward`, `reward.sub_score` or `reward.a+b`. Raises ValueError for anything else."""
        reward, dot, subs = name.partition(".")
        parts = tuple(subs.split("+")) if dot else ()
        if not reward or not all(parts) or len(set(parts)) != len(parts):
            raise ValueError(f"{name!r} names no reward: write reward, reward.sub_score, or reward.a+b")
        return cls(name, reward, parts)

    def value(self, score: ItemScore) -> float:
        """This number of one item. Raises KeyError for a sub-score that the reward does not have."""
        return math.fsum(score.sub_scores[sub] for sub in self.subs) if self.subs else score.reward
