"""The ledger restated in the simplest Python: no Redis, no indices, no atomicity. Each call returns what must happen."""

import math
from dataclasses import dataclass, field

from replay.policy import BufferSettings
from replay.records import Lease

LIVE = ("leased", "pool", "ready")


@dataclass
class Group:
    state: str = "leased"
    attempt: int = 1
    spent: int = 0
    owner: str = ""
    token: str = ""  # of the lease that may commit; "" when revoked
    granted: int = 0
    expired: bool = False
    version: int = 0
    size: int = 0
    scored_by: str = ""
    rests: bool = False  # its owner has given it back and must let the pause pass
    reasons: list[str] = field(default_factory=list)
    prompt: str = ""
    died_in: int = 0  # epoch


@dataclass
class Batch:
    state: str = "leased"  # leased → ready → claimed → gone
    owner: str = ""
    free: bool = False  # its lease has run out or was given back
    size: int = 0


@dataclass
class Oracle:
    run: BufferSettings
    groups: list[Group] = field(default_factory=list)
    batches: list[Batch] = field(default_factory=list)
    claims: dict[int, tuple[list[int], list[int]]] = field(default_factory=dict)
    unpublished: set[int] = field(default_factory=set)
    floors: dict[int, int] = field(default_factory=dict)
    requeued: set[int] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    version: int = 0
    claimed_step: int = 0
    settled_step: int = 0
    epoch: int = 0
    expired: int = 0
    failed: int = 0
    given_back: int = 0
    deaths: int = 0
    expected: str = ""  # rewards that groups must have been scored by; "": any
    largest: int = 0
    group_sizes: list[int] = field(default_factory=list)  # of every commit ever accepted
    batch_sizes: list[int] = field(default_factory=list)

    # -- views ------------------------------------------------------------------------------------

    def among(self, *states: str) -> list[int]:
        return [g for g, group in enumerate(self.groups) if group.state in states]

    def batches_among(self, *states: str) -> list[int]:
        return [k for k, batch in enumerate(self.batches) if batch.state in states]

    def bytes(self) -> int:
        groups = [self.groups[g].size for g in self.among("ready", "claimed")]
        return sum(groups) + sum(self.batches[k].size for k in self.batches_among("ready", "claimed"))

    def charged(self) -> int:
        """Pipeline slots in use."""
        return len(self.among(*LIVE)) + sum(len(self.claims[step][0]) for step in self.unpublished)

    def counts(self) -> dict[str, int]:
        reasons = ("stale", "lineage", "zero_variance", "reward")
        return {
            "leased": len(self.among("leased", "pool")),
            "waiting": len(self.among("pool")),
            **{state: len(self.among(state)) for state in ("ready", "claimed", "settled", "dead")},
            **{f"evicted:{reason}": len(self.among(f"evicted:{reason}")) for reason in reasons},
            "unpublished": sum(len(self.claims[step][0]) for step in self.unpublished),
            "bytes": self.bytes(),
            "bytes_ready": sum(self.groups[g].size for g in self.among("ready")),
            "version": self.version,
            "epoch": self.epoch,
            "claimed_step": self.claimed_step,
            "settled_step": self.settled_step,
            "next_group": len(self.groups),
            "next_data": len(self.batches),
            "data_ready": len(self.batches_among("ready")),
            "data_leased": len(self.batches_among("leased")),
            "data_floor": len(self.batches_among("gone")),
            "requeued": len(self.requeued),
            "dropped_since_claim": len(self.dropped),
            "expired": self.expired,
            "failed": self.failed,
            "given_back": self.given_back,
            "deaths": self.deaths,
        }

    # -- rules ------------------------------------------------------------------------------------

    def letters(self) -> list[tuple[int, list[str], int, str]]:
        """(group, reasons, epoch, prompt) of the dead, by group: the order of deaths within one call is not foreseen."""
        return [(g, self.groups[g].reasons, self.groups[g].died_in, self.groups[g].prompt) for g in self.among("dead")]

    def _spend(self, group: Group, reason: str, revoke: bool) -> None:
        group.spent += 1
        group.reasons.append(reason)
        group.state = "dead" if group.spent >= self.run.max_attempts else "pool"
        group.expired = False
        if revoke or group.state == "dead":
            group.token = ""
        if group.state == "dead":
            self.deaths += 1
            group.died_in = self.epoch

    def _foreign(self, group: Group) -> bool:
        return bool(self.expected) and group.scored_by != self.expected

    def _cut_off(self, group: Group) -> None:
        group.token, group.expired, group.size = "", False, 0
        group.state = "pool" if self.run.remake_cut_off else "evicted:lineage"

    def _alive(self, lineage: int, version: int) -> bool:
        return all(version <= self.floors[epoch] for epoch in range(lineage + 1, self.epoch + 1))

    def _room(self, group_sizes: list[int], batch_sizes: list[int], size: int) -> str:
        """'ok', 'full', or 'budget'."""
        mean = sum(group_sizes) / max(1, len(group_sizes))
        data_mean = sum(batch_sizes) / max(1, len(batch_sizes))
        if mean * self.run.retained_groups + data_mean * self.run.retained_data > self.run.max_bytes or size > self.run.max_bytes:
            return "budget"
        return "full" if self.bytes() + size > self.run.max_bytes else "ok"

    def least(self, g: int, slack: int = 0) -> int:
        """Least version with which live group `g` is expected to stay within the bound."""
        rank = sum(other < g for other in self.among(*LIVE))
        return max(0, self.claimed_step + rank // self.run.groups_per_step + slack - self.run.max_staleness)

    # -- producers --------------------------------------------------------------------------------

    def lease(self, owner: str) -> int | None:
        """The index that must be granted; None: nothing may start."""
        for group in self.groups:
            if group.state == "leased" and group.expired:
                self.expired += 1
                self._spend(group, f"lease expired ({group.owner})", revoke=False)
        for g in self.among("pool"):
            rests = self.groups[g].rests and self.groups[g].owner == owner
            return g if self.least(g) <= self.version and not rests else None
        live, ready = len(self.among(*LIVE)), len(self.among("ready"))
        if self.charged() >= self.run.slots or live + len(self.among("claimed")) >= self.run.retained_groups:
            return None
        if self.bytes() + (live - ready + 1) * self.largest > self.run.max_bytes:
            return None
        g = min(self.requeued, default=len(self.groups))
        return g if self.least(g) <= self.version else None

    def granted(self, lease: Lease, owner: str) -> None:
        """Book the lease; raises AssertionError when it is not as it must be."""
        if lease.group in self.requeued:
            self.requeued.discard(lease.group)
            self.groups[lease.group] = Group(attempt=0)
        elif lease.group == len(self.groups):
            self.groups.append(Group(attempt=0))
        group = self.groups[lease.group]
        group.attempt += 1
        group.state, group.owner, group.token, group.granted, group.rests = "leased", owner, lease.token, self.version, False
        slack = math.ceil((self.run.window - 1) / self.run.groups_per_step)
        assert lease.attempt == group.attempt
        assert lease.min_version == min(self.version, self.least(lease.group, slack))
        assert lease.epoch == self.epoch

    def commit(self, lease: Lease, version: int, lineage: int | None, size: int, flat: bool, scored_by: str) -> str:
        group = self.groups[lease.group]
        if not group.token or group.token != lease.token or group.state not in ("leased", "pool", "ready", "claimed"):
            return "dropped" if flat and lease.token in self.dropped else "lost"
        if group.state in ("ready", "claimed"):
            return "ok"
        if not self._alive(lease.epoch if lineage is None else lineage, version):
            self._cut_off(group)
            return "lost"
        if self.expected and scored_by != self.expected:
            group.state = "evicted:reward"
            return "lost"
        if flat and len(self.dropped) < self.run.drop_limit:
            group.state = "evicted:zero_variance"
            self.dropped.add(lease.token)
            return "dropped"
        room = self._room([*self.group_sizes, size], self.batch_sizes, size)
        if room == "ok":
            group.state, group.version, group.size, group.expired, group.scored_by = "ready", version, size, False, scored_by
            self.group_sizes.append(size)
            self.largest = max(self.largest, size)
        return room

    def holds(self, lease: Lease) -> bool:
        """Whether `lease` may still be extended or failed."""
        group = self.groups[lease.group]
        return group.token == lease.token and group.state in ("leased", "pool")

    def extend(self, lease: Lease) -> bool:
        if not self.holds(lease):
            return False
        self.groups[lease.group].state, self.groups[lease.group].expired = "leased", False
        return True

    def fail(self, lease: Lease, reason: str, prompt: str) -> None:
        if self.holds(lease):
            self.failed += 1
            group = self.groups[lease.group]
            group.prompt = prompt or group.prompt
            self._spend(group, reason, revoke=True)

    def give_back(self, lease: Lease) -> None:
        if self.holds(lease):
            self.given_back += 1
            group = self.groups[lease.group]
            group.state, group.token, group.expired, group.rests = "pool", "", False, True

    def release(self, owner: str) -> tuple[int, int]:
        held = [self.groups[g] for g in self.among("leased") if self.groups[g].owner == owner]
        for group in held:
            self._spend(group, f"released by {owner}", revoke=True)
        batches = [self.batches[k] for k in self.batches_among("leased") if self.batches[k].owner == owner and not self.batches[k].free]
        for batch in batches:
            batch.free = True
        return len(held), len(batches)

    def requeue(self, g: int) -> bool:
        dead = self.groups[g].state == "dead"
        if dead:
            self.requeued.add(g)
        return dead

    def lease_data(self, owner: str) -> int | None:
        for k in self.batches_among("leased"):
            if self.batches[k].free:
                self.batches[k].owner, self.batches[k].free = owner, False
                return k
        unsettled = len(self.batches) - len(self.batches_among("gone"))
        if len(self.batches_among("leased", "ready")) >= self.run.data_depth or unsettled >= self.run.retained_data:
            return None
        self.batches.append(Batch(owner=owner))
        return len(self.batches) - 1

    def commit_data(self, k: int, size: int) -> str:
        batch = self.batches[k]
        if batch.state != "leased":
            return "duplicate"
        room = self._room(self.group_sizes, [*self.batch_sizes, size], size)
        if room == "ok":
            batch.state, batch.size = "ready", size
            self.batch_sizes.append(size)
        return room

    # -- learner ----------------------------------------------------------------------------------

    def expect(self, scored_by: str) -> int:
        """How many ready groups are evicted."""
        self.expected = scored_by
        others = [self.groups[g] for g in self.among("ready") if self._foreign(self.groups[g])]
        for group in others:
            group.state = "evicted:reward"
        return len(others)

    def claim(self, step: int) -> tuple[list[int], list[int]] | None:
        """The composition of a new step; None: not ready. Groups outside the bound are evicted either way."""
        for g in self.among("ready"):
            group = self.groups[g]
            if step - 1 - group.version > self.run.max_staleness:
                group.state = "evicted:stale"
            elif group.version > step - 1:
                group.state = "evicted:lineage"
        first = len(self.batches_among("gone", "claimed"))
        data = list(range(first, first + self.run.data_per_step))
        live, taken = self.among(*LIVE), []
        for _ in range(self.run.groups_per_step):
            inside = [g for g in live if g < live[0] + self.run.window and self.groups[g].state == "ready"]
            if not inside:
                return None
            taken.append(inside[0])
            live.remove(inside[0])
        if not all(k < len(self.batches) and self.batches[k].state == "ready" for k in data):
            return None
        for g in taken:
            self.groups[g].state = "claimed"
        for k in data:
            self.batches[k].state = "claimed"
        self.claims[step] = sorted(taken), data
        self.claimed_step = step
        self.unpublished.add(step)
        self.dropped.clear()
        return self.claims[step]

    def publish(self, step: int) -> None:
        self.unpublished = {other for other in self.unpublished if other > step}
        self.version = max(self.version, step)

    def settle(self, step: int) -> None:
        for done in [other for other in self.claims if other <= step]:
            groups, data = self.claims.pop(done)
            for g in groups:
                self.groups[g].state = "settled"
            for k in data:
                self.batches[k].state = "gone"
            self.unpublished.discard(done)
        self.settled_step = max(self.settled_step, step)

    def rollback(self, step: int) -> tuple[list[int], list[int]]:
        """Returns what the checkpoint of `step` must have stored: group and batch ids since the one before."""
        consumed = [self.claims[s] for s in sorted(self.claims) if s <= step]
        self.epoch += 1
        self.floors[self.epoch] = step
        self.settle(step)
        others = [s for s, (groups, _) in self.claims.items() if any(self._foreign(self.groups[g]) for g in groups)]
        for undone in [s for s in self.claims if others and s >= min(others)]:
            groups, data = self.claims.pop(undone)
            for g in groups:
                self.groups[g].state = "evicted:reward"
            for k in data:
                self.batches[k].state = "ready"
            self.claimed_step = min(self.claimed_step, undone - 1)
        self.unpublished = set(self.claims)
        self.version = step
        for group in self.groups:
            made_by = {"ready": group.version, "leased": group.granted}.get(group.state)
            if made_by is not None and made_by > step:
                self._cut_off(group)
        return [g for groups, _ in consumed for g in groups], [k for _, data in consumed for k in data]
