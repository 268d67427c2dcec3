"""Which rewards a group was scored by: one text per set of names and revisions, so that the ledger can compare them.

Invariant: a run trains on groups of one identity at a time, the one it expects; a group that was scored by another
revision of a reward, or by other rewards, is evicted (reason `reward`). `{"ocr": "r2"} → '{"ocr":"r2"}'`.
"""

import json
from collections.abc import Mapping, Sequence

Scores = Mapping[str, Sequence[float | None]]
"""Per reward, a score for each member of a group; None where this reward failed for that member."""


def identity(revisions: Mapping[str, str] | None) -> str:
    """The same text for the same names and revisions, in whatever order; '' for none."""
    return json.dumps(dict(revisions), sort_keys=True, separators=(",", ":")) if revisions else ""


def check_scores(members: int, scores: Scores, revisions: Mapping[str, str]) -> None:
    """Raises ValueError unless `scores` has a revision for each reward and an entry for each of `members`.

    A score may be named after a part of a reward: `scene.sharpness` belongs to `scene`.
    """
    if scores and {name.partition(".")[0] for name in scores} != revisions.keys():
        raise ValueError(f"scores of {sorted(scores)} but revisions of {sorted(revisions)}: both must name the same rewards")
    for name, entries in scores.items():
        if len(entries) != members:
            raise ValueError(f"reward {name!r} has {len(entries)} scores, the group has {members} members")
