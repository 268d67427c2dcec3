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

import redis

from replay.audit import audit
from replay.errors import ClaimTimeout, PayloadCorrupt
from replay.ledger import Ledger
from replay.payloads import PayloadStore, RedisPayloads, checksum
from replay.policy import BufferSettings, staleness
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader, Lease
from replay.waiting import poll

__all__ = [
    "BufferSettings",
    "Claim",
    "ClaimedData",
    "ClaimedGroup",
    "GroupHeader",
    "Lease",
    "ReplayBuffer",
    "staleness",
]

# Bytes no commit adopted are swept from a shared folder when they are this many leases old.
SWEEP_AFTER_LEASES = 4


class ReplayBuffer:
    """Façade over the ledger and the payload store of one run. Cheap to build; thread-safe."""

    def __init__(
        self,
        client: redis.Redis,
        run: str,
        settings: BufferSettings,
        payloads: PayloadStore | None = None,
    ) -> None:
        self.settings = settings
        self._ledger = Ledger(client, run)
        self._in_redis = payloads is None or isinstance(payloads, RedisPayloads)
        self._payloads = payloads or RedisPayloads(client, run, orphan_ttl_s=max(600.0, SWEEP_AFTER_LEASES * settings.lease_s))

    def initialise(self) -> None:
        """Check settings and server, open the ledger or adopt the existing one. Idempotent.

        Raises `ImpossibleSettings` or `UnsuitableServer`, with the arithmetic.
        """
        self._ledger.initialise(self.settings, self._in_redis)

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
        payload: bytes,
        rewards: Sequence[float],
        version: int,
        meta: Mapping[str, float | int | str] | None = None,
        lineage: int | None = None,
    ) -> bool:
        """Hand in a finished group: payload first, then the ledger entry, in one round trip. Idempotent.

        `version` is the oldest policy version that sampled any transition; `lineage` the learner epoch that
        published those weights (default: the epoch of the lease). False: the lease is lost (someone else has
        the group) or the weights belong to a history that a rollback cut off; drop the group. Raises
        ValueError on a reward that is not finite, `BudgetExceeded` when payloads of this size can never fit.
        """
        if not rewards or version < 0:
            raise ValueError(f"group {lease.group}: {len(rewards)} rewards, version {version}")
        header = GroupHeader(
            rewards=[float(reward) for reward in rewards],
            size=len(rewards),
            version=version,
            bytes=len(payload),
            checksum=checksum(payload),
            meta=dict(meta or {}),
        )
        header.to_json()  # refuse before anything is written
        batch = self._ledger.batch()
        ref = self._payloads.write(f"g{lease.group}-{lease.token}", payload, batch)
        accepted = self._ledger.commit(lease, header, ref, self._payloads.redis_key(ref), lineage, batch)
        if not accepted:
            self._payloads.delete([ref])
        return accepted

    def fail(self, lease: Lease, reason: str) -> None:
        """Give the group back: another attempt, or dead after `max_attempts` with this reason kept."""
        self._ledger.fail(lease, " ".join(reason.split())[:300])

    def release(self, owner: str) -> tuple[int, int]:
        """A restarted producer gives back what its former self held: (groups, data batches) released.

        Without it they come back when their lease expires.
        """
        return self._ledger.release(owner)

    def lease_data(self, owner: str, timeout_s: float) -> int | None:
        """The next data batch index to produce; waits while `data_depth` are unclaimed. None at deadline."""
        token = secrets.token_hex(8)
        return poll(lambda: self._ledger.lease_data(token, owner), timeout_s)

    def commit_data(self, batch: int, payload: bytes) -> None:
        """Hand in data batch `batch`. Idempotent: content depends on the index alone, the first one stays."""
        pipeline = self._ledger.batch()
        ref = self._payloads.write(f"d{batch}-{secrets.token_hex(8)}", payload, pipeline)
        key = self._payloads.redis_key(ref)
        if not self._ledger.commit_data(batch, len(payload), checksum(payload), ref, key, pipeline):
            self._payloads.delete([ref])

    # -- learner ----------------------------------------------------------------------------------

    def rollback(self, step: int, groups: Sequence[int] = (), data: Sequence[int] = ()) -> int:
        """Start (again) from the checkpoint of `step` (0: from scratch); returns the new epoch, which fences
        older ones.

        `groups` and `data` are the ids this checkpoint stored: those claimed since the checkpoint before it.
        They are settled even if the ledger lost their claim. Claims of later steps will be served again
        unchanged; live groups made by versions > `step` are cut off. Raises `CheckpointConflict`, or
        `OutOfOrder` when later steps are already settled.
        """
        epoch = self._ledger.rollback(step, groups, data, secrets.token_hex(8))
        self.collect()
        if not self._in_redis:
            self._payloads.sweep(self._ledger.references(), SWEEP_AFTER_LEASES * self.settings.lease_s)
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

    def fetch(self, item: ClaimedGroup | ClaimedData) -> bytes:
        """The payload, verified. Raises `PayloadMissing` or `PayloadCorrupt`."""
        payload = self._payloads.read(item.ref)
        expected = item.header.checksum if isinstance(item, ClaimedGroup) else item.checksum
        found = checksum(payload)
        if found != expected:
            raise PayloadCorrupt(f"payload {item.ref} ({len(payload)} bytes) has checksum {found}, the ledger says {expected}")
        return payload

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

    def request_stop(self) -> None:
        """Ask every process of the run to finish; they look with `stop_requested`."""
        self._ledger.flag("stop", 1)

    def stop_requested(self) -> bool:
        return self._ledger.flag("stop")

    def clear_stop(self) -> None:
        self._ledger.flag("stop", 0)

    def counts(self) -> dict[str, int]:
        """Groups per state (`leased` includes `waiting`), evictions by reason, data, bytes, version."""
        return self._ledger.counts()

    def dead_letters(self) -> list[tuple[int, str]]:
        """(group, reason) of the latest 1000 dead groups, newest first."""
        return self._ledger.dead_letters()

    def audit(self) -> list[str]:
        """Readable findings; empty when every group ever opened is accounted for exactly once."""
        return audit(self._ledger.snapshot())
