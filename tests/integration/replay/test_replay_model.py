"""A random history of calls against a plain-Python oracle of the ledger, on a real server.

The oracle restates the rules in the simplest form; after every call its view and the ledger's must agree.
Every history ends by driving three more steps, so a history that blocks the run for good is found too.
"""

import itertools
import math
import os
from dataclasses import dataclass
from typing import Any

import redis
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from replay.buffer import BufferSettings, Lease, ReplayBuffer
from replay.errors import ClaimTimeout

RUNS = itertools.count()
# DDRL_REPLAY_EXAMPLES=2000 searches longer, with fresh random histories each time.
EXAMPLES = int(os.environ.get("DDRL_REPLAY_EXAMPLES", "40"))


@dataclass
class Group:
    state: str = "leased"
    attempt: int = 1
    spent: int = 0
    lease: Lease | None = None
    granted: int = 0
    expired: bool = False
    version: int | None = None
    committed: str = ""


class LedgerMachine(RuleBasedStateMachine):
    client: redis.Redis

    @initialize(
        G=st.integers(1, 3), S=st.integers(0, 2), W=st.integers(1, 4), K=st.integers(1, 3),
        attempts=st.integers(1, 3), remake=st.booleans(),
    )  # fmt: skip
    def start(self, G: int, S: int, W: int, K: int, attempts: int, remake: bool) -> None:
        self.run = BufferSettings(
            groups_per_step=G, max_staleness=S, window=min(W, (S + 1) * G), max_attempts=attempts,
            checkpoint_interval=K, remake_cut_off=remake,
        )  # fmt: skip
        self.name = f"model{next(RUNS)}"
        self.buffer = ReplayBuffer(self.client, self.name, self.run)
        self.buffer.initialise()
        self.groups: list[Group] = []
        self.claims: dict[int, list[int]] = {}
        self.unpublished: set[int] = set()
        self.leases: list[Lease] = []
        self.version = self.claimed_step = self.settled_step = 0
        self.floors: dict[int, int] = {}
        self.epoch = 0
        self.restart(0)

    # -- the oracle -------------------------------------------------------------------------------

    def among(self, *states: str) -> list[int]:
        return [g for g, group in enumerate(self.groups) if group.state in states]

    def live(self) -> list[int]:
        return self.among("leased", "pool", "ready")

    def charged(self) -> int:
        return len(self.live()) + sum(len(self.claims[step]) for step in self.unpublished)

    def needed(self, rank: int) -> int:
        return max(0, self.claimed_step + rank // self.run.groups_per_step - self.run.max_staleness)

    def spend(self, group: Group) -> None:
        group.spent += 1
        group.state = "dead" if group.spent >= self.run.max_attempts else "pool"
        group.expired = False

    def cut_off(self, group: Group) -> None:
        group.lease, group.expired, group.version = None, False, None
        group.state = "pool" if self.run.remake_cut_off else "evicted:lineage"

    def alive(self, epoch: int, version: int) -> bool:
        return all(version <= self.floors[e] for e in range(epoch + 1, self.epoch + 1))

    def expected_lease(self) -> int | None:
        for group in self.groups:
            if group.state == "leased" and group.expired:
                self.spend(group)
        live = self.live()
        for g in self.among("pool"):
            return g if self.needed(live.index(g)) <= self.version else None
        retained = len(live) + sum(map(len, self.claims.values()))
        if self.charged() >= self.run.slots or retained >= self.run.retained_groups:
            return None
        return len(self.groups) if self.needed(len(live)) <= self.version else None

    def expected_claim(self, step: int) -> list[int] | None:
        for g in self.among("ready"):
            version = self.groups[g].version
            assert version is not None
            if step - 1 - version > self.run.max_staleness:
                self.groups[g].state = "evicted:stale"
            elif version > step - 1:
                self.groups[g].state = "evicted:lineage"
        live, taken = self.live(), []
        for _ in range(self.run.groups_per_step):
            inside = [g for g in live if g < live[0] + self.run.window and self.groups[g].state == "ready"]
            if not inside:
                return None
            taken.append(inside[0])
            live.remove(inside[0])
        return sorted(taken)

    # -- the calls --------------------------------------------------------------------------------

    @rule()
    def lease(self) -> None:
        expected = self.expected_lease()
        lease = self.buffer.lease("a", 0)
        if expected is None or lease is None:
            assert lease is None
            assert expected is None
            return
        if expected == len(self.groups):
            self.groups.append(Group(attempt=0))
        group = self.groups[expected]
        group.state, group.lease, group.granted = "leased", lease, self.version
        group.attempt += 1
        slack = math.ceil((self.run.window - 1) / self.run.groups_per_step)
        least = min(self.version, max(0, self.needed_unclipped(expected) + slack))
        assert (lease.group, lease.attempt, lease.min_version) == (expected, group.attempt, least)
        assert lease.epoch == self.epoch
        self.leases.append(lease)

    def needed_unclipped(self, g: int) -> int:
        return self.claimed_step + self.live().index(g) // self.run.groups_per_step - self.run.max_staleness

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), behind=st.integers(0, 2), twice=st.booleans())
    def commit(self, data: st.DataObject, behind: int, twice: bool) -> None:
        """Any lease ever handed out, held or lost."""
        lease = data.draw(st.sampled_from(self.leases))
        for _ in range(1 + twice):
            self.commit_lease(lease, max(0, self.version - behind))

    def commit_lease(self, lease: Lease, version: int) -> None:
        group = self.groups[lease.group]
        accepted = False
        if group.committed == lease.token and group.state in ("ready", "claimed"):
            accepted = True
        elif group.lease == lease and group.state in ("leased", "pool"):
            if self.alive(lease.epoch, version):
                accepted = True
                group.state, group.version, group.committed = "ready", version, lease.token
                group.expired = False
            else:
                self.cut_off(group)
        assert self.buffer.commit(lease, b"x%d" % lease.group, [1.0], version) == accepted

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        group = self.groups[lease.group]
        if group.lease == lease and group.state in ("leased", "pool"):
            self.spend(group)
            group.lease = None
        self.buffer.fail(lease, "why")
        self.buffer.fail(lease, "again")

    @precondition(lambda self: self.among("leased"))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        g = data.draw(st.sampled_from(self.among("leased")))
        self.groups[g].expired = True
        self.client.zadd(f"ddrl:{{{self.name}}}:leases", {str(g): 1}, xx=True)

    @rule()
    def claim(self) -> None:
        self.claim_next()

    def claim_next(self) -> bool:
        step = self.claimed_step + 1
        if self.version != step - 1:
            return False
        expected = self.expected_claim(step)
        try:
            claim = self.buffer.claim(step, self.epoch, 0)
        except ClaimTimeout:
            assert expected is None
            return False
        assert [item.group for item in claim.groups] == expected
        for item in claim.groups:
            assert 0 <= step - 1 - item.header.version <= self.run.max_staleness
            self.groups[item.group].state = "claimed"
        self.claims[step], self.claimed_step = [item.group for item in claim.groups], step
        self.unpublished.add(step)
        return True

    @rule(behind=st.integers(0, 1), publish=st.booleans())
    def whole_step(self, behind: int, publish: bool) -> None:
        """The usual course, so that histories get deep: make a step's groups, claim them, publish."""
        for _ in range(self.run.groups_per_step):
            given = len(self.leases)
            self.lease()
            for lease in self.leases[given:]:
                self.commit_lease(lease, max(lease.min_version, self.version - behind))
        if self.claim_next() and publish:
            self.publish()

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def claim_again(self, data: st.DataObject) -> None:
        step = data.draw(st.sampled_from(sorted(self.claims)))
        claim = self.buffer.claim(step, self.epoch, 0)
        assert [item.group for item in claim.groups] == self.claims[step]
        assert [self.buffer.fetch(item) for item in claim.groups] == [b"x%d" % g for g in self.claims[step]]

    @precondition(lambda self: self.unpublished)
    @rule()
    def publish(self) -> None:
        step = min(self.unpublished)
        self.buffer.publish(step, self.epoch)
        self.unpublished.discard(step)
        self.version = max(self.version, step)

    @precondition(lambda self: self.version > self.settled_step)
    @rule(data=st.data())
    def settle(self, data: st.DataObject) -> None:
        step = data.draw(st.integers(self.settled_step + 1, self.version))
        self.buffer.settle(step, self.epoch)
        self.end_claims(step)

    def end_claims(self, step: int) -> None:
        for done in [s for s in self.claims if s <= step]:
            for g in self.claims.pop(done):
                self.groups[g].state = "settled"
            self.unpublished.discard(done)
        self.settled_step = max(self.settled_step, step)

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        self.restart(data.draw(st.integers(self.settled_step, self.version)))

    def restart(self, step: int) -> None:
        consumed = [g for s, groups in self.claims.items() if s <= step for g in groups]
        self.epoch += 1
        assert self.buffer.rollback(step, consumed) == self.epoch
        self.floors[self.epoch] = step
        self.end_claims(step)
        self.unpublished = set(self.claims)
        self.version = step
        for group in self.groups:
            made_by = {"ready": group.version, "leased": group.granted}.get(group.state)
            if made_by is not None and made_by > step:
                self.cut_off(group)

    # -- agreement --------------------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        counts = self.buffer.counts()
        expected = {
            "leased": len(self.among("leased", "pool")),
            "waiting": len(self.among("pool")),
            "ready": len(self.among("ready")),
            "claimed": len(self.among("claimed")),
            "settled": len(self.among("settled")),
            "dead": len(self.among("dead")),
            "evicted:stale": len(self.among("evicted:stale")),
            "evicted:lineage": len(self.among("evicted:lineage")),
            "unpublished": sum(len(self.claims[step]) for step in self.unpublished),
            "bytes": sum(len(b"x%d" % g) for g in self.among("ready", "claimed")),
            "version": self.version,
            "epoch": self.epoch,
            "next_group": len(self.groups),
            "trash": counts["trash"],
        }
        assert {name: counts[name] for name in expected} == expected
        assert self.buffer.audit() == []

    def teardown(self) -> None:
        if not hasattr(self, "groups"):
            return
        for g in self.among("leased"):
            self.groups[g].expired = True
            self.client.zadd(f"ddrl:{{{self.name}}}:leases", {str(g): 1}, xx=True)
        goal = self.claimed_step + 3
        for _ in range(200):
            while self.unpublished:
                self.publish()
            self.buffer.settle(self.version, self.epoch)
            self.end_claims(self.version)
            if self.claimed_step == goal:
                break
            given = len(self.leases)
            self.lease()
            for lease in self.leases[given:]:
                self.commit_lease(lease, self.version)
            self.claim_next()
        assert self.claimed_step == goal, f"the run is stuck: {self.buffer.counts()}"
        self.agree()
        self.client.flushall()


def test_random_histories_agree_with_the_oracle(client: Any) -> None:
    machine = type("Machine", (LedgerMachine,), {"client": client})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=60,
            deadline=None,
            derandomize=EXAMPLES == 40,
            phases=(Phase.generate,) if EXAMPLES == 40 else (Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        ),
    )
