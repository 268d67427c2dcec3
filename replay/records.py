"""What the buffer hands out and keeps about a group: plain frozen records and their JSON form."""

import json
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Lease:
    """The right to make one group.

    `min_version` is the least policy version the sampler must hold; `epoch` is the learner epoch of the
    grant, the lineage those versions belong to.
    """

    group: int
    attempt: int
    token: str
    min_version: int
    epoch: int


@dataclass(frozen=True)
class GroupHeader:
    """The small part of a committed group: what the learner needs to plan before it reads payloads.

    `size` = members = len(rewards), which may be fewer than the run's group size when members failed (their
    number is then in `meta["failed_members"]`); `version` = oldest policy version that sampled any transition; `bytes`
    and `checksum` (the text of its `layout.Layout`: a digest for every block) describe the payload. `rewards` are the
    totals; `scores` holds what each reward gave each member (None: this one failed for it), `revisions` which revision of
    it; both empty in a header of a ledger that did not keep them.
    """

    rewards: list[float]
    size: int
    version: int
    bytes: int
    checksum: str
    meta: dict[str, float | int | str] = field(default_factory=dict)
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> str:
        """Raises ValueError on a NaN or infinite reward: a failed score is a failure, never a number."""
        return json.dumps(self.__dict__, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "GroupHeader":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class ClaimedGroup:
    """A group that belongs to a step; `ref` names its payload in the store.

    `leased_at` and `ready_at`: when its last attempt began and when it was committed, ms of Redis TIME.
    """

    group: int
    header: GroupHeader
    ref: str
    leased_at: int = 0
    ready_at: int = 0


@dataclass(frozen=True)
class ClaimedData:
    """A data batch that belongs to a step; `checksum` as a group's."""

    batch: int
    ref: str
    checksum: str


@dataclass(frozen=True)
class Claim:
    """The fixed composition of one step: groups by ascending index, data batches in order.

    `claimed_at`: when the composition was fixed, ms of Redis TIME (serving it again does not move it).
    """

    step: int
    epoch: int
    groups: list[ClaimedGroup]
    data: list[ClaimedData]
    claimed_at: int = 0


@dataclass(frozen=True)
class DeadLetter:
    """A group whose attempts have all failed.

    `reasons`: why each attempt failed, first to last; `number`: it was the run's n-th death (0: from a ledger that did
    not count them); `epoch`: the learner epoch then; `died_at`: ms of Redis TIME; `prompt`: as its producer told it, or
    ''.
    """

    group: int
    reasons: list[str]
    number: int = 0
    epoch: int = 0
    died_at: int = 0
    prompt: str = ""
