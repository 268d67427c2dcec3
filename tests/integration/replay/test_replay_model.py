"""A random history of calls by several clients against a plain-Python oracle of the ledger, on a real server.

After every call the oracle's view and the ledger's must agree, the audit must be clean and every promise kept. One of
the clients loses replies. Every history ends by driving three more steps, so a history that blocks the run for good is
found too.
"""

import itertools
import os
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from hypothesis import HealthCheck, Phase, event, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from redis.backoff import NoBackoff
from redis.retry import Retry

from replay.buffer import BufferSettings, Lease, ReplayBuffer
from replay.cluster import RunClient
from replay.embedded import EmbeddedRedis
from replay.errors import BudgetExceeded, ClaimTimeout, Fenced
from replay.layout import part_names
from replay.rewards import identity
from tests.integration.replay.oracle import LIVE, Oracle
from tests.integration.replay.proxy import DroppingProxy

RUNS = itertools.count()
# DDRL_REPLAY_EXAMPLES=2000 searches longer, with fresh random histories each time.
EXAMPLES = int(os.environ.get("DDRL_REPLAY_EXAMPLES", "40"))
OWNERS = st.sampled_from(["a", "b"])
SIZES = st.sampled_from([4, 12, 1, 30, 70])
REVISIONS: list[dict[str, str]] = [{"ocr": "r1"}, {"ocr": "r2"}, {}]
WIDE = 1 << 30
PAUSE_MS = 1 << 30  # ends when a test says so


class LedgerMachine(RuleBasedStateMachine):
    client: redis.Redis
    lossy: redis.Redis
    proxy: DroppingProxy

    @initialize(
        G=st.integers(1, 3), S=st.integers(0, 2), W=st.integers(1, 4), K=st.integers(1, 3), D=st.integers(0, 1),
        attempts=st.integers(1, 3), remake=st.booleans(), wide=st.booleans(), drops=st.sampled_from([None, 1, 3]), before=st.sampled_from([60, 0]),
        part=st.sampled_from([16, 1 << 20]),
    )  # fmt: skip
    def start(self, G: int, S: int, W: int, K: int, D: int, attempts: int, remake: bool, wide: bool, drops: int | None, before: int, part: int) -> None:
        """`before`: so many small groups have gone before, which lets large ones in until there is no room; `part`: payloads
        above it are several parts."""
        run = BufferSettings(
            groups_per_step=G, max_staleness=S, window=min(W, (S + 1) * G), max_attempts=attempts, checkpoint_interval=K,
            remake_cut_off=remake, data_per_step=D, data_depth=2, drop_zero_variance=drops is not None, max_drops_per_step=drops, part_bytes=part,
        )  # fmt: skip
        self.run = replace(run, max_bytes=WIDE if wide else 10 * (run.retained_groups + run.retained_data))
        self.name = f"model{next(RUNS)}"
        self.buffers = [ReplayBuffer(client, self.name, self.run) for client in (self.client, self.client, self.lossy)]
        self.buffer = self.buffers[0]
        self.buffer.initialise()
        self.client.hset(self.key("meta"), mapping={"group_commits": before, "group_bytes_sum": before, "pause_ms": PAUSE_MS})
        self.oracle = Oracle(self.run, group_sizes=[1] * before)
        self.leases: list[Lease] = []
        self.content: dict[str, tuple[int, bool]] = {}  # what each lease will produce: (bytes, do all rewards agree)
        self.scored_by: dict[str, dict[str, str]] = {}  # and by which revisions
        self.fleet: dict[str, str] = REVISIONS[0]  # which revisions score now
        self.audited: dict[str, int] = {}
        self.trained: dict[int, list[int]] = {}  # the surviving lineage: step → groups
        self.restart(0, self.buffer)

    def any_client(self, data: st.DataObject) -> ReplayBuffer:
        """One of three; the third may lose the reply of the call that follows."""
        which = data.draw(st.integers(0, 2))
        if which == 2 and data.draw(st.booleans()):
            self.proxy.drop = 1
        return self.buffers[which]

    def key(self, name: str) -> str:
        return f"ddrl:{{{self.name}}}:{name}"

    # -- producers --------------------------------------------------------------------------------

    @rule(data=st.data(), owner=OWNERS, size=SIZES, flat=st.sampled_from([False, False, True]))
    def lease(self, data: st.DataObject, owner: str, size: int, flat: bool) -> None:
        self.lease_with(self.any_client(data), owner, size, flat)

    def lease_with(self, buffer: ReplayBuffer, owner: str, size: int, flat: bool) -> Lease | None:
        expected = self.oracle.lease(owner)
        lease = buffer.lease(owner, 0)
        assert (lease and lease.group) == expected
        if lease is not None:
            self.oracle.granted(lease, owner)
            self.leases.append(lease)
            self.content[lease.token] = size, flat
            self.scored_by[lease.token] = self.fleet
        return lease

    @precondition(lambda self: self.leases)
    @rule(data=st.data(), behind=st.integers(0, 2), twice=st.booleans(), told=st.booleans())
    def commit(self, data: st.DataObject, behind: int, twice: bool, told: bool) -> None:
        """Any lease ever handed out, held or lost, sometimes with a lineage of the caller's own."""
        lease = data.draw(st.sampled_from(self.leases))
        lineage = data.draw(st.integers(1, self.oracle.epoch)) if told else None
        for _ in range(1 + twice):
            self.commit_lease(self.any_client(data), lease, max(0, self.oracle.version - behind), lineage)

    def commit_lease(self, buffer: ReplayBuffer, lease: Lease, version: int, lineage: int | None = None) -> None:
        (size, flat), scored_by = self.content[lease.token], self.scored_by[lease.token]
        expected = self.oracle.commit(lease, version, lineage, size, flat, identity(scored_by))
        event(f"commit: {expected}")
        rewards = [1.0, 1.0] if flat else [1.0, 2.0]

        def call() -> bool:
            return buffer.commit(lease, self.payload(lease.group, size), rewards, version, lineage=lineage, timeout_s=0, revisions=scored_by)

        if expected in ("budget", "full"):
            with pytest.raises(BudgetExceeded, match="retained" if expected == "budget" else "held by"):
                call()
        else:
            assert call() == (expected != "lost")

    def payload(self, number: int, size: int) -> bytes:
        return bytes([number % 256]) * size

    @rule(data=st.data(), sizes=st.lists(SIZES, min_size=2, max_size=5), newest_first=st.booleans())
    def burst(self, data: st.DataObject, sizes: list[int], newest_first: bool) -> None:
        """Several producers lease, then hand in groups of sizes nobody expected."""
        made = [self.lease_with(self.any_client(data), "b", size, False) for size in sizes]
        for lease in reversed(made) if newest_first else made:
            if lease is not None:
                self.commit_lease(self.any_client(data), lease, self.oracle.version)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        prompt = data.draw(st.sampled_from(["", f"prompt {lease.group}"]))
        self.oracle.fail(lease, "why", prompt)
        self.any_client(data).fail(lease, "why", prompt)
        self.any_client(data).fail(lease, "again", "another")

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """The producer lacks something else."""
        lease = data.draw(st.sampled_from(self.leases))
        self.oracle.give_back(lease)
        self.any_client(data).give_back(lease, "no weights")
        self.any_client(data).give_back(lease, "again")

    @rule()
    def the_pause_passes(self) -> None:
        for g, group in enumerate(self.oracle.groups):
            if group.rests and group.state == "pool":
                group.rests = False
                self.client.hset(self.key(f"group:{g}"), "rests", 1)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        lease = data.draw(st.sampled_from(self.leases))
        assert self.any_client(data).extend(lease) == self.oracle.extend(lease)

    @rule(owner=OWNERS)
    def release(self, owner: str) -> None:
        """A producer died and started again."""
        assert self.buffer.release(owner) == self.oracle.release(owner)
        assert self.buffer.release(owner) == (0, 0)

    @precondition(lambda self: self.oracle.among("leased"))
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        """A producer died, or its heartbeat stopped."""
        g = data.draw(st.sampled_from(self.oracle.among("leased")))
        self.oracle.groups[g].expired = True
        self.client.zadd(self.key("leases"), {str(g): 1}, xx=True)

    @precondition(lambda self: self.oracle.groups)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        dead = self.oracle.among("dead")
        g = data.draw(st.sampled_from(dead or range(len(self.oracle.groups))))
        assert self.buffer.requeue(g) == self.oracle.requeue(g)
        assert self.any_client(data).requeue(g) == self.oracle.requeue(g)

    @rule(data=st.data(), owner=OWNERS)
    def lease_data(self, data: st.DataObject, owner: str) -> None:
        if self.run.data_per_step:
            assert self.any_client(data).lease_data(owner, 0) == self.oracle.lease_data(owner)

    @precondition(lambda self: self.oracle.batches)
    @rule(data=st.data(), size=SIZES, newest=st.booleans())
    def commit_data(self, data: st.DataObject, size: int, newest: bool) -> None:
        last = len(self.oracle.batches) - 1
        k = last if newest else data.draw(st.integers(0, last))
        self.commit_batch(self.any_client(data), k, size)

    def commit_batch(self, buffer: ReplayBuffer, k: int, size: int) -> None:
        expected = self.oracle.commit_data(k, size)
        event(f"commit_data: {expected}")
        if expected in ("budget", "full"):
            with pytest.raises(BudgetExceeded, match="retained" if expected == "budget" else "held by"):
                buffer.commit_data(k, self.payload(k, size), timeout_s=0)
        else:
            buffer.commit_data(k, self.payload(k, size), timeout_s=0)

    @precondition(lambda self: self.oracle.batches_among("leased"))
    @rule(data=st.data())
    def expire_data(self, data: st.DataObject) -> None:
        k = data.draw(st.sampled_from(self.oracle.batches_among("leased")))
        self.oracle.batches[k].free = True
        self.client.zadd(self.key("data_leases"), {str(k): 0}, xx=True)

    @rule(number=st.integers(0, 9))
    def die_between_payload_and_commit(self, number: int) -> None:
        batch = self.client.pipeline(transaction=False)
        self.buffer._payloads.write(f"g{number}-dead", [[b"never"], [b"adopted"]], batch)
        batch.execute()

    # -- learner ----------------------------------------------------------------------------------

    @rule(data=st.data(), revisions=st.sampled_from(REVISIONS), restart=st.booleans())
    def the_reward_changes(self, data: st.DataObject, revisions: dict[str, str], restart: bool) -> None:
        """The driver comes back with a reward fleet of the same or of other revisions; mostly the learner then starts."""
        self.fleet = revisions
        evicted = self.oracle.expect(identity(revisions))
        event(f"expect: {'evicts' if evicted else 'evicts none'}")
        lost = self.proxy.dropped
        found = self.any_client(data).expect_rewards(revisions)
        assert found == (evicted if self.proxy.dropped == lost else 0)
        if restart:
            claimed = self.oracle.claimed_step
            self.restart(data.draw(st.integers(self.oracle.settled_step, self.oracle.version)), self.any_client(data))
            event(f"rollback: {'takes claims apart' if self.oracle.claimed_step < claimed else 'keeps the claims'}")

    @rule(data=st.data())
    def claim(self, data: st.DataObject) -> None:
        self.claim_next(self.any_client(data))

    def claim_next(self, buffer: ReplayBuffer) -> bool:
        step = self.oracle.claimed_step + 1
        expected = self.oracle.claim(step)
        event(f"claim: {'ready' if expected else 'not ready'}")
        try:
            claim = buffer.claim(step, self.oracle.epoch, 0)
        except ClaimTimeout:
            assert expected is None
            return False
        assert ([item.group for item in claim.groups], [item.batch for item in claim.data]) == expected
        for item in claim.groups:
            assert 0 <= step - 1 - item.header.version <= self.run.max_staleness
            assert self.oracle.expected in ("", identity(item.header.revisions))
        self.trained[step] = [item.group for item in claim.groups]
        return True

    @rule(data=st.data(), behind=st.integers(0, 1), size=SIZES, publish=st.booleans())
    def whole_step(self, data: st.DataObject, behind: int, size: int, publish: bool) -> None:
        """The usual course, so that histories get deep: make a step's groups, claim them, publish."""
        for _ in range(self.run.groups_per_step):
            lease = self.lease_with(self.any_client(data), "a", size, False)
            if lease is not None:
                self.commit_lease(self.any_client(data), lease, max(lease.min_version, self.oracle.version - behind))
        self.produce_data(data)
        if self.claim_next(self.any_client(data)) and publish:
            self.publish_step(self.any_client(data), self.oracle.claimed_step)

    def produce_data(self, data: st.DataObject | None = None) -> None:
        buffer = self.any_client(data) if data else self.buffer
        if self.run.data_per_step:
            number = buffer.lease_data("a", 0)
            assert number == self.oracle.lease_data("a")
            if number is not None:
                self.commit_batch(buffer, number, 1)

    @precondition(lambda self: self.oracle.claims)
    @rule(data=st.data())
    def claim_again(self, data: st.DataObject) -> None:
        """Another rank asks, or a restarted learner."""
        step = data.draw(st.sampled_from(sorted(self.oracle.claims)))
        groups, batches = self.oracle.claims[step]
        claim = self.any_client(data).claim(step, self.oracle.epoch, 0)
        assert [item.group for item in claim.groups] == groups
        assert [item.batch for item in claim.data] == batches
        fetched = [self.buffer.fetch(item) for item in (*claim.groups, *claim.data)]
        held = [(g, self.oracle.groups[g].size) for g in groups] + [(k, self.oracle.batches[k].size) for k in batches]
        assert fetched == [self.payload(number, size) for number, size in held]

    @precondition(lambda self: self.oracle.unpublished)
    @rule(data=st.data())
    def publish(self, data: st.DataObject) -> None:
        self.publish_step(self.any_client(data), data.draw(st.sampled_from(sorted(self.oracle.unpublished))))

    def publish_step(self, buffer: ReplayBuffer, step: int) -> None:
        buffer.publish(step, self.oracle.epoch)
        self.oracle.publish(step)

    @precondition(lambda self: self.oracle.version > self.oracle.settled_step)
    @rule(data=st.data(), dies=st.booleans(), fenced=st.booleans())
    def settle(self, data: st.DataObject, dies: bool, fenced: bool) -> None:
        step = data.draw(st.integers(self.oracle.settled_step + 1, self.oracle.version))
        epoch = self.oracle.epoch if fenced else None
        buffer = self.any_client(data)
        if dies:
            buffer._ledger.settle(step, epoch)  # before the payloads are deleted
        else:
            buffer.settle(step, epoch)
        self.oracle.settle(step)

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        self.restart(data.draw(st.integers(self.oracle.settled_step, self.oracle.version)), self.any_client(data))

    def restart(self, step: int, buffer: ReplayBuffer) -> None:
        groups, batches = self.oracle.rollback(step)
        assert buffer.rollback(step, groups, batches) == self.oracle.epoch

    @precondition(lambda self: self.oracle.epoch > 1)
    @rule(data=st.data())
    def a_learner_of_an_older_epoch_comes_back(self, data: st.DataObject) -> None:
        old = data.draw(st.integers(0, self.oracle.epoch - 1))
        buffer, step = self.any_client(data), self.oracle.claimed_step
        for call in (lambda: buffer.claim(step + 1, old, 0), lambda: buffer.publish(step, old), lambda: buffer.settle(step, old)):
            with pytest.raises(Fenced):
                call()

    # -- agreement --------------------------------------------------------------------------------

    @invariant()
    def agree(self) -> None:
        self.proxy.drop = 0  # a call that sent nothing (a refused one) has lost nothing
        counts, expected = self.buffer.counts(), self.oracle.counts()
        assert {name: counts[name] for name in expected} == expected
        state = {name: value for name, value in counts.items() if not name.endswith("_ms")}
        if state != self.audited:  # a call that moved nothing has left nothing to audit
            assert self.buffer.audit() == []
            self.audited = state
        assert counts["bytes"] <= self.run.max_bytes
        assert len(self.oracle.among(*LIVE)) <= self.run.slots
        assert len(self.oracle.among(*LIVE, "claimed")) <= self.run.retained_groups
        letters = self.buffer.dead_letters() if self.oracle.deaths else []
        assert sorted((letter.group, letter.reasons, letter.epoch, letter.prompt) for letter in letters) == self.oracle.letters()
        numbers = [letter.number for letter in letters]
        assert numbers == sorted(set(numbers), reverse=True), "newest first, each with a number of its own"
        seen = [g for groups in self.trained.values() for g in groups]
        assert len(seen) == len(set(seen)), "a group is in two steps of one lineage"

    def teardown(self) -> None:
        if not hasattr(self, "oracle"):
            return
        self.run = replace(self.run, max_bytes=WIDE)  # the operator makes room for a run that was refused some
        self.buffer = ReplayBuffer(self.client, self.name, self.run)
        self.buffer.initialise()
        self.oracle.run = self.run
        for g in self.oracle.among("leased"):
            self.oracle.groups[g].expired = True
            self.client.zadd(self.key("leases"), {str(g): 1}, xx=True)
        for k in self.oracle.batches_among("leased"):
            self.oracle.batches[k].free = True
            self.client.zadd(self.key("data_leases"), {str(k): 0}, xx=True)
        self.the_pause_passes()
        goal = self.oracle.claimed_step + 3
        for _ in range(200):
            if self.oracle.unpublished:
                self.publish_step(self.buffer, max(self.oracle.unpublished))
            self.buffer.settle(self.oracle.version, self.oracle.epoch)
            self.oracle.settle(self.oracle.version)
            if self.oracle.claimed_step == goal:
                break
            lease = self.lease_with(self.buffer, "a", 1, False)
            if lease is not None:
                self.commit_lease(self.buffer, lease, self.oracle.version)
            self.produce_data()
            self.claim_next(self.buffer)
        assert self.oracle.claimed_step == goal, f"the run is stuck: {self.buffer.counts()}"
        self.agree()
        self.no_payload_is_lost_or_left()
        self.client.flushall()

    def no_payload_is_lost_or_left(self) -> None:
        self.buffer.collect()
        prefix = self.key("payload:")
        kept = {key.decode().removeprefix(prefix) for key in self.client.scan_iter(prefix + "*") if self.client.ttl(key) == -1}
        assert kept == {name for ref in self.buffer._ledger.snapshot().references for name in part_names(ref)}


@pytest.fixture
def proxy(server: EmbeddedRedis) -> Any:
    parts = urlsplit(server.url)
    running = DroppingProxy(str(parts.hostname), int(parts.port or 0))
    yield running
    running.close()


def test_random_histories_agree_with_the_oracle(server: EmbeddedRedis, client: Any, proxy: DroppingProxy) -> None:
    url = server.url.replace(f":{urlsplit(server.url).port}/", f":{proxy.port}/")
    lossy = RunClient.from_url(url, protocol=2, retry=Retry(NoBackoff(), 3, (redis.ConnectionError,)))
    machine = type("Machine", (LedgerMachine,), {"client": client, "lossy": lossy, "proxy": proxy})
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
    assert proxy.dropped > EXAMPLES, "the lossy client has lost replies"
