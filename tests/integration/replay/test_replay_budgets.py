"""Strict bytes, zero-variance groups, partial groups, times, dead letters made again, trim and forget."""

import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis

from replay import payloads
from replay.buffer import BufferSettings, Lease, ReplayBuffer
from replay.errors import BudgetExceeded, ImpossibleSettings, InUse, NotInitialised, ReplayError
from replay.payloads import FolderPayloads, make_payloads

Make = Callable[..., Any]


def payload_keys(driver: Any) -> int:
    return len(list(driver.client.scan_iter(f"ddrl:{{{driver.run}}}:payload:*", count=1000)))


@pytest.fixture
def grown(make_driver: Make) -> tuple[Any, int, list[Lease]]:
    """A driver whose groups were small for 12 steps: (driver, epoch, three leases granted before sizes jump)."""
    driver = make_driver(groups_per_step=1, max_staleness=2, max_bytes=4000)
    epoch = driver.buffer.rollback(0)
    for step in range(1, 13):
        driver.step(step, epoch)
        driver.buffer.settle(step)
    return driver, epoch, [driver.take() for _ in range(3)]


def test_bytes_never_exceed_the_budget(grown: tuple[Any, int, list[Lease]]) -> None:
    """Sizes that jump: the commit waits for room instead of overshooting, and enters when room appears."""
    driver, epoch, (small, big, late) = grown
    buffer = driver.buffer
    assert buffer.commit(small, b"x" * 100, [1.0], 12)
    assert buffer.commit(big, b"x" * 1800, [1.0], 12)
    with pytest.raises(BudgetExceeded, match=r"group 14: 0\.0 MB held by 2 ready or claimed groups"):
        buffer.commit(late, b"z" * 2101, [1.0], 12, timeout_s=0)
    assert (driver.count("bytes"), payload_keys(driver)) == (1900, 2), "nothing is left of a commit that gave up"
    done: list[bool] = []
    waiter = threading.Thread(target=lambda: done.append(buffer.commit(late, b"z" * 2101, [1.0], 12, timeout_s=20)))
    waiter.start()
    for step in (13, 14):
        time.sleep(0.05)
        assert not done
        assert driver.count("bytes") == 1900
        buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
        assert buffer.extend(late), "the heartbeat goes on meanwhile"
    buffer.settle(14)
    waiter.join(10)
    assert done == [True]
    assert driver.count("bytes") == 2101
    assert buffer.fetch(buffer.claim(15, epoch, 0).groups[0]) == b"z" * 2101


def test_a_commit_that_waits_for_room_sends_its_payload_once_and_keeps_it_from_expiring(grown: tuple[Any, int, list[Lease]], eventually: Any) -> None:
    driver, epoch, (first, second, third) = grown
    buffer = driver.buffer
    assert buffer.commit(first, b"x" * 100, [1.0], 12)
    assert buffer.commit(second, b"x" * 1900, [1.0], 12)
    key = f"ddrl:{{{driver.run}}}:payload:g{third.group}-{third.token}"
    done: list[bool] = []
    waiter = threading.Thread(target=lambda: done.append(buffer.commit(third, b"x" * 2001, [1.0], 12, timeout_s=20)))
    waiter.start()
    eventually(lambda: driver.client.exists(key), 10)
    sets = driver.client.info("commandstats")["cmdstat_set"]["calls"]
    driver.client.pexpire(key, 30_000)
    eventually(lambda: driver.client.pttl(key) > 30_000, 10)  # each try puts the expiry off
    assert driver.client.info("commandstats")["cmdstat_set"]["calls"] == sets
    for step in (13, 14):
        buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
    buffer.settle(14)
    waiter.join(10)
    assert done == [True]
    assert driver.client.pttl(key) == -1


def test_a_data_batch_waits_for_room_too(grown: tuple[Any, int, list[Lease]]) -> None:
    driver, epoch, (first, second, _) = grown
    buffer = driver.buffer
    buffer.commit(first, b"x" * 100, [1.0], 12)
    buffer.commit(second, b"x" * 1900, [1.0], 12)
    wider = ReplayBuffer(driver.client, driver.run, replace(buffer.settings, data_per_step=1, data_depth=1))
    wider.initialise()
    batch = wider.lease_data("f", 0)
    assert batch == 0
    with pytest.raises(BudgetExceeded, match=r"4 retained groups x .* \+ 3 data batches x"):
        wider.commit_data(0, b"d" * 2001, timeout_s=0)
    for name in ("group_bytes_sum", "data_bytes_sum"):  # as after a long history of small payloads
        driver.client.hset(f"ddrl:{{{driver.run}}}:meta", name, 0)
    driver.client.hset(f"ddrl:{{{driver.run}}}:meta", "data_commits", 1000)
    with pytest.raises(BudgetExceeded, match=r"data batch 0: .* for 0 s"):
        wider.commit_data(0, b"d" * 2001, timeout_s=0)
    done: list[None] = []
    waiter = threading.Thread(target=lambda: done.append(wider.commit_data(0, b"d" * 2001, timeout_s=20)))
    waiter.start()
    time.sleep(0.05)
    assert not done
    assert driver.count("bytes") == 2000
    buffer.initialise()  # without data again: a step takes groups alone
    buffer.claim(13, epoch, 0)
    buffer.publish(13, epoch)
    buffer.settle(13)
    waiter.join(10)
    assert done == [None]
    assert driver.count("bytes") == 1900 + 2001


def test_zero_variance_groups_are_dropped_and_refilled(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=0, drop_zero_variance=True, max_drops_per_step=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    flat, full = driver.take(), driver.take()
    assert driver.lease() is None
    assert buffer.commit(flat, b"flat", [0.5, 0.5 + 1e-12], 0)
    assert buffer.commit(flat, b"flat", [0.5, 0.5 + 1e-12], 0), "a repeat after a lost reply is still accepted"
    counts = buffer.counts()
    assert (counts["evicted:zero_variance"], counts["dropped_since_claim"], counts["bytes"]) == (1, 1, 0)
    assert payload_keys(driver) == 0
    driver.commit(full, 0)
    refill = driver.take()
    assert refill.group == 2, "its slot is free, the next index fills it"
    assert buffer.commit(refill, b"flat", [1.0], 0), "one member agrees with itself"
    last = driver.take()
    assert buffer.commit(last, b"group 3", [2.0, 2.0], 0)
    assert driver.count("ready") == 2, "after two drops further ones are kept: a converged policy still trains"
    assert driver.claim(1, epoch) == [1, 3]
    assert driver.count("dropped_since_claim") == 0
    assert not buffer.commit(flat, b"flat", [0.5, 0.5], 0), "its repeat is forgotten with the new claim; the caller drops it all the same"
    buffer.publish(1, epoch)
    again = driver.take()
    assert buffer.commit(again, b"flat", [0.0, 0.0], 1)
    assert driver.count("evicted:zero_variance") == 3


def test_zero_variance_groups_are_kept_by_default(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    epoch = driver.buffer.rollback(0)
    assert driver.buffer.commit(driver.take(), b"group 0", [0.5, 0.5], 0)
    assert driver.claim(1, epoch) == [0]


def test_a_group_may_come_with_fewer_members(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    epoch = driver.buffer.rollback(0)
    driver.make(1, 0)
    lease = driver.take()
    assert driver.buffer.commit(lease, b"group 1", [1.0, 2.0, 3.0], 0, {"failed_members": 1, "failures": "no text"})
    whole, partial = driver.buffer.claim(1, epoch, 0).groups
    assert (whole.header.size, partial.header.size, partial.header.rewards) == (2, 3, [1.0, 2.0, 3.0])
    assert partial.header.meta == {"failed_members": 1, "failures": "no text"}
    assert driver.buffer.fetch(partial) == b"group 1"


def test_times_and_counters(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=2, max_attempts=3)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    empty = buffer.counts()
    assert [empty[f"oldest_{state}_ms"] for state in ("leased", "ready", "claimed")] == [0, 0, 0]
    began = buffer.counts()
    driver.buffer.fail(driver.take(), "x")
    driver.expire(driver.take())
    driver.make(2, 0)
    held = driver.take()
    time.sleep(0.03)
    counts = buffer.counts()
    assert (counts["expired"], counts["failed"], counts["bytes_ready"]) == (1, 1, len(b"group 0group 1"))
    assert counts["oldest_ready_ms"] >= counts["oldest_leased_ms"] >= 30
    claim = buffer.claim(1, epoch, 0)
    group = claim.groups[0]
    assert 0 < group.leased_at <= group.ready_at < claim.claimed_at
    assert buffer.claim(1, epoch, 0) == claim, "times do not move"
    time.sleep(0.02)
    assert buffer.counts()["oldest_claimed_ms"] >= 20
    assert set(began) == set(counts)
    driver.commit(held, 0)


def test_attach_reads_everything_from_the_ledger(make_driver: Make, tmp_path: Path) -> None:
    with pytest.raises(NotInitialised, match="no ledger of run 'nobody'"):
        ReplayBuffer.attach(make_driver(groups_per_step=1).client, "nobody")
    for place in ("redis", str(tmp_path)):
        settings = BufferSettings(
            groups_per_step=3, data_per_step=1, max_staleness=2, window=4, lease_s=0.25, max_attempts=5, max_bytes=12345,
            data_depth=6, checkpoint_interval=7, remake_cut_off=True, drop_zero_variance=True, max_drops_per_step=9,
        )  # fmt: skip
        driver = make_driver(groups_per_step=1)
        run = f"{driver.run}-attach"
        ReplayBuffer(driver.client, run, settings, make_payloads(place, driver.client, run, settings)).initialise()
        attached = ReplayBuffer.attach(driver.client, run)
        assert attached.settings == settings
        lease = attached.lease("a", 0)
        assert lease is not None
        assert attached.commit(lease, b"x", [1.0, 2.0], 0)
    assert [file.name for file in (tmp_path / run).iterdir()] == [f"g0-{lease.token}"]
    with pytest.raises(ImpossibleSettings, match="unsettled payloads are in"):
        ReplayBuffer(driver.client, run, settings).initialise()


def test_a_dead_group_is_made_again_under_its_index(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_attempts=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    for reason in ("first", "second"):
        buffer.fail(driver.take(), reason)
    kept = driver.take()
    assert (kept.group, driver.count("dead")) == (1, 1)
    assert [(letter.group, letter.reasons) for letter in buffer.dead_letters()] == [(0, ["first", "second"])]
    assert not buffer.requeue(1)
    assert buffer.requeue(0)
    assert buffer.requeue(0)
    counts = buffer.counts()
    assert (counts["dead"], counts["requeued"]) == (1, 1), "dead until someone leases it"
    assert len(buffer.dead_letters()) == 1
    again = driver.take()
    assert (again.group, again.attempt) == (0, 1)
    counts = buffer.counts()
    assert (counts["dead"], counts["requeued"], counts["next_group"]) == (0, 0, 2)
    assert buffer.dead_letters() == []
    assert not buffer.requeue(0), "alive"
    buffer.fail(again, "third")
    assert driver.count("dead") == 0, "all its attempts are back"
    assert driver.make(1, 0) == [0]
    driver.commit(kept, 0)
    assert driver.claim(1, epoch) == [0, 1]


def test_requeued_groups_respect_the_budgets(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=1, max_attempts=1)
    for _ in range(2):
        driver.buffer.fail(driver.take(), "x")
    driver.make(2, 0)
    assert driver.buffer.requeue(1)
    assert driver.buffer.requeue(0)
    assert driver.lease() is None, "the pipeline is full"
    epoch = driver.buffer.rollback(0)
    driver.claim(1, epoch)
    driver.buffer.publish(1, epoch)
    driver.buffer.settle(1)
    assert driver.take().group == 0, "the lowest first"


def test_many_dead_letters_keep_the_latest(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_attempts=1)
    for group in range(1003):
        driver.buffer.fail(driver.take(), f"reason {group}")
    letters = driver.buffer.dead_letters()
    assert len(letters) == 1000
    assert [(letter.group, letter.reasons, letter.number) for letter in (letters[0], letters[-1])] == [(1002, ["reason 1002"], 1003), (3, ["reason 3"], 4)]
    for name in ("letters", "deaths", "dead_order"):
        kind = driver.client.llen if name == "dead_order" else driver.client.hlen
        assert kind(f"ddrl:{{{driver.run}}}:{name}") == 1000
    assert driver.buffer.requeue(0), "its letter is gone, its index is not"
    assert driver.take().group == 0


@pytest.mark.parametrize("place", ["redis", "folder"])
def test_trim_deletes_what_nobody_needs(make_driver: Make, tmp_path: Path, place: str) -> None:
    driver = make_driver(payloads=FolderPayloads(tmp_path) if place == "folder" else None, groups_per_step=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    lease = driver.take()
    driver.commit(lease, 0)
    driver.make(1, 0)
    batch = driver.client.pipeline(transaction=False)
    buffer._payloads.write("g7-stray", [[b"never committed"]], batch)
    buffer._payloads.write("g8-young", [[b"about to be committed"]], batch)
    batch.execute()
    if place == "folder":
        for name in ("g7-stray", f"g0-{lease.token}"):
            os.utime(tmp_path / name, (1, 1))
    else:
        driver.client.pexpire(f"ddrl:{{{driver.run}}}:payload:g7-stray", 60_000)
        buffer._payloads._ttl_ms = 700_000
        driver.client.pexpire(f"ddrl:{{{driver.run}}}:payload:g8-young", 690_000)
    assert buffer.trim() == {"trash": 0, "orphans": 1}
    assert driver.claim(1, epoch) == [0, 1]
    buffer.publish(1, epoch)
    buffer._ledger.settle(1, epoch)  # the process dies before it deletes the payloads
    assert buffer.trim() == {"trash": 2, "orphans": 0}
    assert buffer.counts()["trash"] == 0


@pytest.mark.parametrize("place", ["redis", "folder"])
def test_forget_deletes_a_run_and_no_other(client: redis.Redis, tmp_path: Path, place: str) -> None:
    settings = BufferSettings(groups_per_step=1)
    runs = [
        ReplayBuffer(client, name, settings, make_payloads("redis" if place == "redis" else str(tmp_path), client, name, settings)) for name in ("go", "go2")
    ]
    for run in runs:
        run.initialise()
        lease = run.lease("a", 0)
        assert lease is not None
        run.commit(lease, b"x", [1.0], 0)
    gone, stays = runs
    assert gone.lease("a", 0)
    with pytest.raises(InUse, match="1 groups and 0 data batches are leased"):
        gone.forget()
    assert gone.counts()["ready"] == 1
    assert gone.forget(force=True) > 5
    assert not list(client.scan_iter("ddrl:{go}:*"))
    assert not (tmp_path / "go").exists()
    assert stays.counts()["ready"] == 1
    assert stays.audit() == []
    with pytest.raises(NotInitialised):
        gone.counts()
    gone.initialise()
    assert gone.counts()["next_group"] == 0
    stays.forget(force=True)
    gone.forget()


def test_a_half_forgotten_run_can_only_be_forgotten(client: redis.Redis) -> None:
    run = ReplayBuffer(client, "half", BufferSettings(groups_per_step=1))
    run.initialise()
    run.lease("a", 0)
    run._ledger.close(force=True)  # the process dies here
    with pytest.raises(ReplayError, match="half deleted"):
        run.initialise()
    with pytest.raises(NotInitialised):
        run.lease("a", 0)
    ReplayBuffer.attach(client, "half").forget()
    assert not list(client.scan_iter("ddrl:{half}:*"))


@pytest.mark.parametrize("together", [8 << 20, 0])
def test_a_full_server_makes_commits_wait_and_says_so(together: int, make_driver: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the payload goes with its ledger entry, or ahead of it."""
    monkeypatch.setattr(payloads, "TOGETHER_BYTES", together)
    driver = make_driver(groups_per_step=1)
    lease = driver.take()
    driver.client.config_set("maxmemory", 1)
    done: list[bool] = []
    try:
        with pytest.raises(ReplayError, match=r"maxmemory and did not store 7 bytes"):
            driver.buffer.commit(lease, b"group 0", [1.0, 2.0], 0, timeout_s=0)
        waiter = threading.Thread(target=lambda: done.append(driver.commit(lease, 0)))
        waiter.start()
        time.sleep(0.05)
        assert not done
    finally:
        driver.client.config_set("maxmemory", 0)
    waiter.join(10)
    assert done == [True]
    assert driver.claim(1, driver.buffer.rollback(0)) == [0]
