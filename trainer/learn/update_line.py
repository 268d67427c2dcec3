"""What metrics.jsonl says of one update: numbers of the learner and of the groups it trained on, and warnings. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from replay.records import Claim
from trainer.config.run import RunConfig
from trainer.learn.advantages import GroupScores, flat_groups
from trainer.learn.batch import scores_of, terms_of

MUCH_CLIPPED = 0.2
"""Share of clipped ratios above which an update says so."""


def update_record(config: RunConfig, claim: Claim, stats: dict[str, Any], seconds: dict[str, float]) -> dict[str, Any]:
    """The metrics line of the update that trained on `claim`.

    Args:
        stats: what the learner found.
        seconds: what the rank's time went to.
    """
    step = claim.step
    record: dict[str, Any] = {"kind": "update", "step": step, **stats, "seconds": {k: round(v, 4) for k, v in seconds.items()}}
    if not claim.groups:
        return record
    headers = [g.header for g in claim.groups]
    scores = [scores_of(h) for h in headers]
    staleness = [step - 1 - h.version for h in headers]
    kept, failed = sum(h.size for h in headers), sum(int(h.meta.get("failed_members", 0)) for h in headers)
    record |= {
        **reward_spread([r for h in headers for r in h.rewards]),
        **({"reward_std": statistics.fmean(spread)} if (spread := [statistics.stdev(h.rewards) for h in headers if len(h.rewards) > 1]) else {}),
        **score_statistics(scores, terms_of(config)),
        "trained_groups": [g.group for g in claim.groups],
        "failed_members": failed,
        "valid_rate": kept / (kept + failed),
        "zero_variance_groups": flat_groups(scores),
        "staleness_mean": statistics.fmean(staleness),
        "staleness_max": max(staleness),
    }
    for name in ("sample", "score"):
        values = [float(h.meta[f"{name}_s"]) for h in headers if f"{name}_s" in h.meta]
        record["seconds"][name] = round(sum(values) / max(1, len(values)), 4)
    return record


def reward_spread(totals: Sequence[float]) -> dict[str, Any]:
    """Of the rewards of an update's rollouts: `reward_mean`; `reward_quantiles`, at 10, 50 and 90 %; `reward_at_top`, the share of them that have
    the highest, which grows where a reward has an upper end and the policy reaches it."""
    found: dict[str, Any] = {"reward_mean": statistics.fmean(totals), "reward_at_top": sum(r == max(totals) for r in totals) / len(totals)}
    if len(totals) > 1:
        cuts = statistics.quantiles(totals, n=10, method="inclusive")
        found["reward_quantiles"] = {"10": cuts[0], "50": cuts[4], "90": cuts[8]}
    return found


def score_statistics(scores: Sequence[GroupScores], terms: Iterable[str]) -> dict[str, dict[str, float]]:
    """By term, over the groups of an update: `rewards`, the mean score; `rewards_std`, the mean standard deviation within a
    group; `failed_scores`, how many members have none. A term without any score has no mean; one that never failed no count."""
    rewards: dict[str, float] = {}
    spread: dict[str, float] = {}
    failed: dict[str, float] = {}
    for name in terms:
        known = [[s for s in group[name] if s is not None] for group in scores]
        if any(known):
            rewards[name] = statistics.fmean([s for group in known for s in group])
        if within := [statistics.stdev(group) for group in known if len(group) > 1]:
            spread[name] = statistics.fmean(within)
        if missing := sum(s is None for group in scores for s in group[name]):
            failed[name] = missing
    return {"rewards": rewards, "rewards_std": spread} | ({"failed_scores": failed} if failed else {})


class Warnings:
    """What a person should know about an update: told when it begins to be true, not again while it stays so."""

    def __init__(self) -> None:
        self._true: set[str] = set()

    def new(self, config: RunConfig, stats: dict[str, Any]) -> list[str]:
        """Warnings that the statistics of this update call for and those of the last one did not."""
        objective, found = config.objective, {}
        clipped = stats.get("clip_fraction", 0.0)
        if clipped > MUCH_CLIPPED:
            found["clip"] = (
                f"{100 * clipped:.0f} % of the probability ratios lie outside 1 ± {objective.clip:g} (kernel={config.sampler.kernel}): where the reward asks "
                f"for more of the same, these transitions are not learnt from; raise objective.clip, set objective.log_prob (now {objective.log_prob}) "
                "to a scaling with smaller ratios, or lower replay.max_staleness"
            )
        told = [text for key, text in found.items() if key not in self._true]
        self._true = set(found)
        return told
