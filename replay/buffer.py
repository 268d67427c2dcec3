"""The replay buffer: what producers, learner ranks and the driver call.

Lifecycle of a group: leased → ready → claimed(step) → settled, or evicted(reason) / dead(reason). Invariant:
the ledger in Redis plus the step of the last registered checkpoint are the only truth; any process may die
between two calls, and calling again is always right.

A worked step, with G groups a step and steps counted from 1:

    epoch = buffer.rollback(0)                        # rank 0, once per start of the worker group
    lease = buffer.lease("sampler-3", timeout_s=30)   # sampler; weights >= lease.min_version, scores
    buffer.commit(lease, payload, rewards, version=0, meta={})
    claim = buffer.claim(1, epoch, timeout_s=600)     # learner; every rank may ask, all get the same groups
    payloads = [buffer.fetch(group) for group in claim.groups]
    buffer.publish(1, epoch)                          # weights of version 1 are live: G slots are free
    buffer.settle(1)                                  # its checkpoint is registered: payloads are deleted
"""

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import redis
from redis.client import Pipeline

from replay.audit import audit
from replay.errors import ClaimTimeout
from replay.handin import hand_in
from replay.layout import Buffer, Layout, pack
from replay.ledger import Answer, Ledger, StoredPart
from replay.payloads import IN_REDIS, FolderPayloads, PayloadStore, RedisPayloads, orphan_age_s
from replay.policy import BufferSettings, staleness, zero_variance
from replay.reading import read_segments
from replay.records import Claim, ClaimedData, ClaimedGroup, DeadLetter, GroupHeader, Lease
from replay.rewards import Scores, check_scores, identity
from replay.waiting import poll

__all__ = [
    "BufferSettings",
    "Claim",
    "ClaimedData",
    "ClaimedGroup",
    "DeadLetter",
    "GroupHeader",
    "Lease",
    "ReplayBuffer",
    "staleness",
]

# Seconds a commit waits for room in the byte budget, by default.
ROOM_TIMEOUT_S = 120.0


class ReplayBuffer:
    """Façade over the ledger and the payload store of one run. Cheap to build; thread-safe."""

    def __init__(
        self,
        client: redis.Redis,
        run: str,
        settings: BufferSettings,
        payloads: PayloadStore | None = None,
    ) -> None:
        """`payloads`: see `payloads.make_payloads`; by default beside the ledger in Redis."""
        self.settings = settings
        self._ledger = Ledger(client, run)
        self._payloads = payloads or RedisPayloads(client, run, orphan_age_s(settings))

    @classmethod
    def attach(cls, client: redis.Redis, run: str, payloads: PayloadStore | None = None) -> Self:
        """The buffer of a run that exists, with the settings its driver wrote. Raises `NotInitialised`."""
        settings, place = Ledger(client, run).settings()
        if payloads is None and place != IN_REDIS:
            payloads = FolderPayloads(Path(place))
        return cls(client, run, settings, payloads)

    def initialise(self) -> None:
        """Check settings, server and payload store, open the ledger or adopt the existing one. Idempotent.

        Raises `ImpossibleSettings` or `UnsuitableServer`, with the arithmetic.
        """
        self._payloads.check(self.settings.max_bytes)
        self._ledger.initialise(self.settings, self._payloads.place)

    # -- producers --------------------------------------------------------------------------------

    def lease(self, owner: str, timeout_s: float) -> Lease | None:
        """The next group to make; waits while the pipeline is full. None at the deadline."""
        token = secrets.token_hex(8)
        return poll(lambda: self._ledger.lease(token, owner), timeout_s)

    def extend(self, lease: Lease) -> bool:
        """Heartbeat: the lease runs `lease_s` from now. False: it is lost, stop working on it."""
        return self._ledger.extend(lease)

    def commit(
        self,
        lease: Lease,
        payload: Buffer | Sequence[Buffer],
        rewards: Sequence[float],
        version: int,
        meta: Mapping[str, float | int | str] | None = None,
        lineage: int | None = None,
        timeout_s: float = ROOM_TIMEOUT_S,
        scores: Scores | None = None,
        revisions: Mapping[str, str] | None = None,
    ) -> bool:
        """Hand in a finished group: payload first, then the ledger entry, small ones in one round trip. Idempotent.

        `payload`: its segments, each of which can be read by itself (`read`) and may be made when it is asked for, always the
        same; bytes alone are one segment.
        `rewards`: one per member that was scored, at least one. `version` is the oldest policy version that
        sampled any transition; `lineage` the learner epoch that published those weights (default: the epoch of
        the lease). `scores`: what each reward gave each member, `revisions` which revision of it; `rewards` is their
        total. True also when the run drops zero-variance groups and this was one: it is not needed any more. False:
        the lease is lost (someone else has the group), the weights belong to a history that a rollback cut off, or the
        run expects other revisions of the rewards (see `expect_rewards`); drop the group.

        While `max_bytes` is taken it waits up to `timeout_s` (keep the heartbeat going), then raises
        `BudgetExceeded`; so it does at once when payloads of this size can never fit. Raises ValueError on a
        reward that is not finite, and on scores that do not fit the members or the revisions.
        """
        if not rewards or version < 0:
            raise ValueError(f"group {lease.group}: {len(rewards)} rewards, version {version}")
        check_scores(len(rewards), scores or {}, revisions or {})
        packed = pack(payload, self.settings.part_bytes)
        header = GroupHeader(
            rewards=[float(reward) for reward in rewards],
            size=len(rewards),
            version=version,
            bytes=packed.bytes,
            checksum=packed.layout.text(),
            meta=dict(meta or {}),
            scores={name: list(entries) for name, entries in (scores or {}).items()},
            revisions=dict(revisions or {}),
        )
        header.to_json()  # refuses a bad reward before anything is written
        flat = zero_variance(rewards)

        def tell(ref: str, parts: list[StoredPart], batch: Pipeline) -> Answer:
            return self._ledger.commit(lease, header, flat, ref, parts, lineage, batch)

        answer = hand_in(self._payloads, f"group {lease.group}", f"g{lease.group}-{lease.token}", packed, self._ledger.batch, tell, timeout_s)
        return answer != "lost"

    def fail(self, lease: Lease, reason: str, prompt: str = "") -> None:
        """The group could not be made: another attempt, or dead after `max_attempts` with this reason (and prompt) kept."""
        self._ledger.fail(lease, _line(reason), _line(prompt))

    def give_back(self, lease: Lease, reason: str) -> None:
        """The group could not be begun for want of something else (weights, a reward fleet): no attempt is spent.

        Anyone may have it at once, the same owner after `GIVE_BACK_PAUSE_S`. Idempotent; without the lease it does nothing.
        """
        self._ledger.give_back(lease, _line(reason))

    def release(self, owner: str) -> tuple[int, int]:
        """A restarted producer gives back what its former self held: (groups, data batches) released.

        Without it they come back when their lease expires.
        """
        return self._ledger.release(owner)

    def lease_data(self, owner: str, timeout_s: float) -> int | None:
        """The next data batch index to produce; waits while `data_depth` are unclaimed. None at deadline."""
        token = secrets.token_hex(8)
        return poll(lambda: self._ledger.lease_data(token, owner), timeout_s)

    def commit_data(self, batch: int, payload: Buffer | Sequence[Buffer], timeout_s: float = ROOM_TIMEOUT_S) -> None:
        """Hand in data batch `batch`. Idempotent: content depends on the index alone, the first one stays.

        Waits for room and raises like `commit`.
        """
        packed = pack(payload, self.settings.part_bytes)

        def tell(ref: str, parts: list[StoredPart], pipeline: Pipeline) -> Answer:
            return self._ledger.commit_data(batch, packed.bytes, packed.layout.text(), ref, parts, pipeline)

        hand_in(self._payloads, f"data batch {batch}", f"d{batch}-{secrets.token_hex(8)}", packed, self._ledger.batch, tell, timeout_s)

    # -- learner ----------------------------------------------------------------------------------

    def expect_rewards(self, revisions: Mapping[str, str]) -> int:
        """From now on train only on groups that were scored by exactly these rewards at these revisions; empty: by any.

        To be called before the learner starts. Ready groups scored otherwise are evicted (reason `reward`), their number
        is returned; commits of such groups are refused; the next `rollback` takes apart the claims that hold some, and
        their steps are formed anew. The same revisions again change nothing, so a resume serves the same compositions.
        """
        evicted = self._ledger.expect(identity(revisions))
        self.collect()
        return evicted

    def rollback(self, step: int, groups: Sequence[int] = (), data: Sequence[int] = ()) -> int:
        """Start (again) from the checkpoint of `step` (0: from scratch); returns the new epoch, which fences
        older ones.

        `groups` and `data` are the ids this checkpoint stored: those claimed since the checkpoint before it.
        They are settled even if the ledger lost their claim. Claims of later steps will be served again
        unchanged, but for groups of other rewards than the run expects; live groups made by versions > `step` are cut off. Raises `CheckpointConflict`, or
        `OutOfOrder` when later steps are already settled.
        """
        epoch = self._ledger.rollback(step, groups, data, secrets.token_hex(8))
        self.collect()
        if self._payloads.place != IN_REDIS:  # there orphans expire
            self._sweep()
        return epoch

    def claim(self, step: int, epoch: int, timeout_s: float) -> Claim:
        """The groups and data batches of `step`; waits until they are ready. The same answer every time it is
        asked.

        Raises `ClaimTimeout` with the counts per state, `Fenced`, `OutOfOrder`.
        """

        def attempt() -> Claim | None:
            claim, trash = self._ledger.claim(step, epoch)
            if claim is None and trash:
                self.collect()
            return claim

        claim = poll(attempt, timeout_s)
        if claim is None:
            raise ClaimTimeout(step, timeout_s, self.counts(), self._ledger.last_failure())
        return claim

    def read(self, item: ClaimedGroup | ClaimedData, segments: Sequence[int] | None = None) -> list[memoryview]:
        """Segments of the payload (all by default), verified: only their bytes are read, large ones in parallel.

        The views lie in one buffer, one behind the other, which the caller may keep and write to. Raises `PayloadMissing`,
        `PayloadCorrupt`, and ReplayError for a payload of another version.
        """
        layout = Layout.parse(item.header.checksum if isinstance(item, ClaimedGroup) else item.checksum)
        return read_segments(self._payloads, item.ref, layout, range(layout.segments) if segments is None else segments)

    def fetch(self, item: ClaimedGroup | ClaimedData) -> bytes:
        """All segments of the payload as one; see `read`."""
        return b"".join(self.read(item))

    def publish(self, step: int, epoch: int) -> None:
        """The weights of version `step` are live; the pipeline slots of its claim are free. Idempotent."""
        self._ledger.publish(step, epoch)

    def settle(self, step: int, epoch: int | None = None) -> None:
        """The checkpoint of `step` is registered: every claim <= step is done, its payloads are deleted.
        Idempotent.

        Pass the `epoch` reported with the checkpoint to fence off a late caller of an older learner.
        """
        self._ledger.settle(step, epoch)
        self.collect()

    # -- anyone -----------------------------------------------------------------------------------

    def collect(self) -> int:
        """Delete payloads the ledger has dropped; a crash in between leaves them for the next call."""
        refs = self._ledger.trash()
        if refs:
            self._payloads.delete(refs)
            self._ledger.forget_trash(refs)
        return len(refs)

    def _sweep(self) -> int:
        return self._payloads.sweep(self._ledger.snapshot().references, orphan_age_s(self.settings))

    def trim(self) -> dict[str, int]:
        """Delete what nobody needs any more: payloads the ledger dropped (`trash`), bytes no commit adopted and
        older than any lease (`orphans`). Returns how many of each."""
        return {"trash": self.collect(), "orphans": self._sweep()}

    def forget(self, force: bool = False) -> int:
        """Delete the run: every key and every payload; returns how many. Raises `InUse` while leases are alive,
        unless `force`. May be called again after a crash in between; afterwards everything raises
        `NotInitialised`."""
        self._ledger.close(force)
        return self._payloads.clear() + self._ledger.erase()

    def requeue(self, group: int) -> bool:
        """A dead group shall be made again under its own index, with all its attempts; it takes the place of the next
        new index. Idempotent. False: it is not dead.

        Being the oldest index again, it goes to the front: with a small window the learner waits for it.
        """
        return self._ledger.requeue(group)

    def request_stop(self) -> None:
        """Ask every process of the run to finish; they look with `stop_requested`."""
        self._ledger.flag("stop", 1)

    def stop_requested(self) -> bool:
        return self._ledger.flag("stop")

    def clear_stop(self) -> None:
        self._ledger.flag("stop", 0)

    def allow_start(self, allowed: bool = True) -> None:
        """Whether learners may begin: what they train on must be known first, see `expect_rewards`."""
        self._ledger.flag("start", int(allowed))

    def may_start(self) -> bool:
        return self._ledger.flag("start")

    def counts(self) -> dict[str, int]:
        """Groups per state (`leased` includes `waiting`), evictions by reason, lease expiries and failures so far,
        data, bytes, version, and ages in ms: see `lua/counts.lua`."""
        return self._ledger.counts()

    def dead_letters(self, since: int = -1) -> list[DeadLetter]:
        """The latest 1000 groups that are dead, newest first; with `since`, those that died after the `since`-th death.

        `counts()["deaths"]` at a start is the `since` of what has died from then on.
        """
        return [letter for letter in self._ledger.dead_letters() if letter.number > since]

    def first_death(self, since: int = -1) -> DeadLetter | None:
        """The oldest of `dead_letters(since)`: what began to go wrong."""
        return next(reversed(self.dead_letters(since)), None)

    def audit(self) -> list[str]:
        """Readable findings; empty when every group ever opened is accounted for exactly once."""
        return audit(self._ledger.snapshot())


def _line(text: str) -> str:
    return " ".join(text.split())[:300]
