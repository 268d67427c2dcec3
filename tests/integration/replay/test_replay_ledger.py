"""The ledger on a real server: lifecycle, fencing, budgets, rollback. Every test ends in an audit."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis

from replay.buffer import BufferSettings, ReplayBuffer, staleness
from replay.errors import (
    BudgetExceeded,
    CheckpointConflict,
    ClaimTimeout,
    Fenced,
    ImpossibleSettings,
    NotInitialised,
    OutOfOrder,
    PayloadCorrupt,
    PayloadMissing,
    ReplayError,
    UnsuitableServer,
)
from replay.payloads import FolderPayloads

Make = Callable[..., Any]


def payload_keys(driver: Any) -> int:
    return len(list(driver.client.scan_iter(f"ddrl:{{{driver.run}}}:payload:*", count=1000)))


def test_lifecycle(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, data_per_step=1, checkpoint_interval=2)
    buffer: ReplayBuffer = driver.buffer
    epoch = buffer.rollback(0)
    assert epoch == 1
    lease = driver.take()
    assert (lease.group, lease.attempt, lease.min_version, lease.epoch) == (0, 1, 0, 1)
    assert buffer.commit(lease, b"group 0", [0.5, 1.0], 0, {"sample_s": 2.5})
    driver.make(1, 0)
    assert buffer.lease_data("feeder", 0) == 0
    buffer.commit_data(0, b"latents")
    claim = buffer.claim(1, epoch, 0)
    assert [item.group for item in claim.groups] == [0, 1]
    header = claim.groups[0].header
    assert (header.rewards, header.size, header.version, header.bytes) == ([0.5, 1.0], 2, 0, 7)
    assert header.meta == {"sample_s": 2.5}
    assert buffer.fetch(claim.groups[0]) == b"group 0"
    assert buffer.fetch(claim.data[0]) == b"latents"
    buffer.publish(1, epoch)
    assert driver.count("version") == 1
    assert driver.count("bytes") == 2 * 7 + 7
    buffer.settle(1, epoch)
    counts = buffer.counts()
    assert (counts["settled"], counts["claimed"], counts["bytes"], counts["trash"]) == (2, 0, 0, 0)
    assert payload_keys(driver) == 0


def test_every_operation_twice(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    lease = driver.take()
    assert driver.commit(lease, 0)
    before = driver.state()
    assert driver.commit(lease, 0)
    assert driver.state() == before
    driver.make(1, 0)
    first = buffer.claim(1, epoch, 0)
    assert driver.again().buffer.claim(1, epoch, 0) == first
    assert driver.commit(lease, 0), "a late repeat of an accepted commit is still accepted"
    assert buffer.fetch(first.groups[0]) == b"group 0"
    buffer.publish(1, epoch)
    buffer.publish(1, epoch)
    buffer.settle(1, epoch)
    after = driver.state()
    buffer.settle(1, epoch)
    buffer.initialise()
    assert driver.state() == after
    assert not driver.commit(lease, 0), "the group has ended"
    assert payload_keys(driver) == 0


def test_a_repeated_lease_request_gets_the_same_lease(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, data_per_step=1)
    ledger = driver.buffer._ledger
    assert ledger.lease("token-1", "a") == ledger.lease("token-1", "a")
    assert ledger.lease_data("token-2", "a") == ledger.lease_data("token-2", "a") == 0
    assert ledger.rollback(0, [], [], "token-3") == ledger.rollback(0, [], [], "token-3") == 1


def test_expired_lease_is_leased_again_then_dead(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_attempts=3)
    stolen = driver.take("a")
    for attempt in (2, 3):
        driver.expire(stolen)
        lease = driver.take("b")
        assert (lease.group, lease.attempt) == (0, attempt)
        assert not driver.commit(stolen, 0), "the former holder has lost it"
        assert not driver.buffer.extend(stolen)
        stolen = lease
    driver.buffer.fail(stolen, "scorer said\n no")
    assert [(letter.group, letter.reasons[-1]) for letter in driver.buffer.dead_letters()] == [(0, "scorer said no")]
    driver.buffer.fail(stolen, "again")
    assert driver.count("dead") == 1
    assert driver.take().group == 1
    assert payload_keys(driver) == 0


def test_a_real_expiry_by_the_servers_clock(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=0, lease_s=0.4)
    held = driver.take("a")
    assert driver.lease("b") is None
    extended = time.monotonic()
    assert driver.buffer.extend(held)
    again = driver.buffer.lease("b", 20)
    assert again is not None
    assert (again.group, again.attempt) == (0, 2)
    assert time.monotonic() - extended > 0.38


def test_an_expired_lease_nobody_took_may_still_be_committed(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=0)
    lease = driver.take()
    driver.expire(lease)
    assert driver.commit(lease, 0)
    assert driver.count("ready") == 1


def test_fail_gives_the_group_to_the_next_asker(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    first, second = driver.take("a"), driver.take("a")
    driver.buffer.fail(first, "no text found")
    assert driver.count("waiting") == 1
    assert not driver.commit(first, 0)
    again = driver.take("b")
    assert (again.group, again.attempt) == (0, 2)
    assert driver.commit(again, 0)
    assert driver.commit(second, 0)


def test_a_restarted_owner_releases_what_it_held(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, data_per_step=1)
    driver.take("a")
    driver.take("b")
    assert driver.buffer.lease_data("a", 0) == 0
    assert driver.buffer.release("a") == (1, 1)
    assert driver.buffer.release("a") == (0, 0)
    assert driver.take("c").group == 0
    assert driver.buffer.lease_data("c", 0) == 0


def test_capacity_blocks_at_the_slots_and_publish_frees(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=1, checkpoint_interval=3)
    epoch = driver.buffer.rollback(0)
    driver.make(4, 0)
    assert driver.lease() is None
    driver.claim(1, epoch)
    assert driver.lease() is None, "a claim alone frees nothing"
    driver.buffer.publish(1, epoch)
    assert [driver.take().min_version for _ in range(2)] == [1, 1]
    assert driver.lease() is None


def test_a_blocked_lease_starts_as_soon_as_publish_frees_a_slot(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=0)
    epoch = driver.buffer.rollback(0)
    driver.make(1, 0)
    driver.claim(1, epoch)
    got: list[Any] = []
    waiter = threading.Thread(target=lambda: got.append(driver.buffer.lease("b", 10)))
    waiter.start()
    time.sleep(0.03)
    driver.buffer.publish(1, epoch)
    waiter.join(5)
    assert got
    assert got[0].min_version == 1


def test_retained_groups_block_until_settle(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=0, checkpoint_interval=2)
    epoch = driver.buffer.rollback(0)
    for step in (1, 2, 3):
        driver.step(step, epoch)
    assert driver.lease() is None, "3 groups are retained: (0 + 1 + 2) x 1"
    driver.buffer.settle(2, epoch)
    assert driver.lease() is not None


def test_settle_settles_every_earlier_claim(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, checkpoint_interval=3)
    epoch = driver.buffer.rollback(0)
    for step in (1, 2, 3):
        driver.step(step, epoch)
    driver.buffer.settle(3)
    assert driver.count("settled") == 6
    with pytest.raises(OutOfOrder, match="settled"):
        driver.claim(2, epoch)


def test_bytes_block_and_impossible_sizes_are_refused(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=1, max_bytes=3000)
    lease = driver.take()
    with pytest.raises(BudgetExceeded, match=r"3 retained groups x 0\.0 MB"):
        driver.buffer.commit(lease, b"x" * 1001, [1.0], 0)
    assert driver.buffer.commit(lease, b"x" * 600, [1.0], 0)
    grown = driver.take()
    assert driver.buffer.commit(grown, b"x" * 1300, [1.0], 0)
    epoch = driver.buffer.rollback(0)
    driver.buffer.claim(1, epoch, 0)
    driver.buffer.publish(1, epoch)
    assert driver.lease() is None, "1900 bytes held + 1300 for the next group exceed 3000"
    driver.buffer.settle(1)
    assert driver.lease() is not None


def test_epoch_fences_the_older_learner(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    old = driver.buffer.rollback(0)
    driver.make(1, 0)
    new = driver.buffer.rollback(0)
    for call in (
        lambda: driver.buffer.claim(1, old, 0),
        lambda: driver.buffer.publish(1, old),
        lambda: driver.buffer.settle(1, old),
    ):
        with pytest.raises(Fenced, match="ledger is at epoch 2"):
            call()
    assert driver.claim(1, new) == [0]


def test_steps_come_in_order(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    epoch = driver.buffer.rollback(0)
    driver.make(1, 0)
    with pytest.raises(OutOfOrder, match="next new claim is step 1"):
        driver.buffer.claim(2, epoch, 0)
    with pytest.raises(OutOfOrder, match="only reach step 0"):
        driver.buffer.publish(1, epoch)
    with pytest.raises(OutOfOrder, match="only reach step 0"):
        driver.buffer.settle(1)
    driver.buffer.publish(0, epoch)


def test_strict_order_is_by_index_not_arrival(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=1, window=1)
    epoch = driver.buffer.rollback(0)
    leases = [driver.take() for _ in range(4)]
    for lease in reversed(leases[1:]):
        driver.commit(lease, 0)
    with pytest.raises(ClaimTimeout, match="ready 3"):
        driver.claim(1, epoch)
    driver.commit(leases[0], 0)
    assert driver.claim(1, epoch) == [0, 1]


def test_window_passes_a_straggler_but_not_far(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=3, window=3)
    epoch = driver.buffer.rollback(0)
    leases = [driver.take() for _ in range(8)]
    for lease in leases[2:]:
        driver.commit(lease, 0)
    with pytest.raises(ClaimTimeout):
        driver.claim(1, epoch)  # only index 2 is less than 3 past the oldest; 3 is not
    driver.commit(leases[1], 0)
    assert driver.claim(1, epoch) == [1, 2]
    with pytest.raises(ClaimTimeout):
        driver.claim(2, epoch)
    driver.commit(leases[0], 0)
    assert driver.claim(2, epoch) == [0, 3]


def test_a_slow_straggler_is_never_trained_beyond_the_bound(make_driver: Make) -> None:
    """The schedule of the unit test that reaches staleness 2 without eviction; here S = 1 holds at every claim."""
    driver = make_driver(groups_per_step=2, max_staleness=1, window=3, checkpoint_interval=4)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    straggler = None
    measured = []
    for step in (1, 2, 3):
        while (lease := driver.lease()) is not None:
            if lease.group == 3 and straggler is None:
                straggler = lease
            else:
                driver.commit(lease, max(lease.min_version, step - 2))
        if step == 3:
            with pytest.raises(ClaimTimeout):
                driver.claim(3, epoch)
            assert driver.commit(straggler, straggler.min_version)
        claim = buffer.claim(step, epoch, 0)
        measured.append([(group.group, staleness(step, group.header.version)) for group in claim.groups])
        buffer.publish(step, epoch)
    assert measured == [[(0, 0), (1, 0)], [(2, 1), (4, 0)], [(5, 1), (6, 0)]]
    assert driver.count("evicted:stale") == 1, "group 3 would have been 2 versions old"


def test_stale_groups_are_evicted_at_claim_and_replaced(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=0, checkpoint_interval=4)
    epoch = driver.buffer.rollback(0)
    driver.step(1, epoch)
    lease = driver.take()
    assert lease.min_version == 1
    assert driver.commit(lease, 0), "a sampler that ignores min_version"
    with pytest.raises(ClaimTimeout):
        driver.claim(2, epoch)
    assert driver.count("evicted:stale") == 1
    assert driver.make(1, 1) == [2]
    assert driver.claim(2, epoch) == [2]
    assert payload_keys(driver) == 2


def test_claim_timeout_tells_the_counts_and_the_last_failure(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    epoch = driver.buffer.rollback(0)
    driver.buffer.fail(driver.take(), "no answer from the scorer")
    with pytest.raises(ClaimTimeout, match=r"waiting 1.*last failure: group 0: no answer from the scorer") as caught:
        driver.buffer.claim(1, epoch, 0.05)
    assert caught.value.counts["leased"] == 1


def test_rollback_replays_the_same_composition(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, data_per_step=1, checkpoint_interval=4)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    claims = {}
    for step in (1, 2, 3, 4):
        number = buffer.lease_data("feeder", 0)
        buffer.commit_data(number, f"batch {number}".encode())
        driver.make(2, step - 1)
        claims[step] = buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
        if step == 1:
            buffer.settle(1)
    epoch = buffer.rollback(1, groups=[0, 1], data=[0])
    assert (driver.count("version"), driver.count("unpublished")) == (1, 6)
    assert driver.lease() is None, "the replayed claims fill the pipeline"
    for step in (2, 3, 4):
        again = buffer.claim(step, epoch, 0)
        assert (again.groups, again.data) == (claims[step].groups, claims[step].data)
        assert [buffer.fetch(item) for item in again.data] == [f"batch {step - 1}".encode()]
        buffer.publish(step, epoch)
    assert driver.count("unpublished") == 0
    assert driver.make(2, 4) == [8, 9]


def test_rollback_cuts_off_the_dead_lineage(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=2, checkpoint_interval=4)
    epoch = driver.buffer.rollback(0)
    kept = driver.take("kept")  # granted under version 0
    driver.make(1, 0)
    assert driver.commit(kept, 0)
    driver.claim(1, epoch)
    driver.buffer.publish(1, epoch)
    zombie, ready = driver.take("zombie"), driver.make(1, 1)  # made by version 1
    new = driver.buffer.rollback(0)
    counts = driver.buffer.counts()
    assert (counts["evicted:lineage"], counts["ready"], counts["leased"]) == (2, 1, 0)
    assert not driver.commit(zombie, 1)
    assert driver.claim(1, new) == [0]
    assert driver.claim(2, new) == [1], "sampled by version 0, which is alive"
    assert ready == [3]
    assert payload_keys(driver) == 2


def test_a_commit_from_weights_of_a_dead_lineage_is_refused(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=3, checkpoint_interval=4)
    old = driver.buffer.rollback(0)
    early = [driver.take() for _ in range(2)]  # granted under version 0, sampled later
    driver.commit(early[0], 0)
    driver.claim(1, old)
    driver.buffer.publish(1, old)
    new = driver.buffer.rollback(0)
    assert driver.count("leased") == 1
    assert not driver.commit(early[1], 1), "version 1 of epoch 1 was rolled back"
    assert driver.count("evicted:lineage") == 1
    driver.claim(1, new)
    driver.buffer.publish(1, new)
    fresh = driver.take()
    assert fresh.epoch == new
    assert driver.commit(fresh, 1), "version 1 of epoch 2 is alive"
    other = driver.take()
    assert not driver.commit(other, 1, lineage=old), "the sampler says its weights are the old ones"


def test_remade_groups_leave_no_holes(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=0, checkpoint_interval=4, remake_cut_off=True)
    epoch = driver.buffer.rollback(0)
    driver.step(1, epoch)
    held = driver.take()
    driver.make(1, 1)
    new = driver.buffer.rollback(0)
    counts = driver.buffer.counts()
    assert (counts["evicted"], counts["remade"], counts["waiting"]) == (0, 2, 2)
    assert not driver.commit(held, 1)
    assert driver.lease() is None, "step 2 needs version 1, which is not there yet"
    assert driver.claim(1, new) == [0, 1]
    driver.buffer.publish(1, new)
    leases = [driver.take(), driver.take()]
    assert [lease.group for lease in leases] == [2, 3]
    assert [lease.min_version for lease in leases] == [1, 1]
    for lease in leases:
        driver.commit(lease, 1)
    assert driver.claim(2, new) == [2, 3]


def test_rollback_settles_from_the_checkpoint_when_the_settle_was_missed(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, checkpoint_interval=2)
    epoch = driver.buffer.rollback(0)
    claimed = driver.step(1, epoch) + driver.step(2, epoch)
    driver.buffer.rollback(2, groups=claimed)
    assert driver.count("settled") == 4
    assert payload_keys(driver) == 0


def test_rollback_on_a_ledger_that_lost_everything(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, data_per_step=1)
    epoch = driver.buffer.rollback(10, groups=[20, 19], data=[9])
    counts = driver.buffer.counts()
    assert (counts["settled"], counts["evicted:forgotten"], counts["next_group"]) == (2, 19, 21)
    assert (counts["version"], counts["claimed_step"], counts["next_data"]) == (10, 10, 10)
    assert driver.buffer.lease_data("f", 0) == 10
    driver.buffer.commit_data(10, b"x")
    assert driver.make(2, 10) == [21, 22]
    assert driver.claim(11, epoch) == [21, 22]


def test_rollback_refuses_what_cannot_be(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, checkpoint_interval=2)
    epoch = driver.buffer.rollback(0)
    driver.step(1, epoch)
    driver.buffer.settle(1)
    driver.step(2, epoch)
    with pytest.raises(OutOfOrder, match="settled through step 1"):
        driver.buffer.rollback(0)
    with pytest.raises(CheckpointConflict, match=r"group 1 .* claimed by step 2"):
        driver.buffer.rollback(1, groups=[1])
    assert driver.count("epoch") == epoch, "a refused rollback changes nothing"


def test_supervised_mode_has_data_only(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=0, data_per_step=1, data_depth=2, checkpoint_interval=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    with pytest.raises(ReplayError, match="makes no groups"):
        driver.lease()
    served = []
    for step in range(1, 7):
        while (number := buffer.lease_data("f", 0)) is not None:
            buffer.commit_data(number, b"%d" % number)
        claim = buffer.claim(step, epoch, 0)
        served += [item.batch for item in claim.data]
        buffer.publish(step, epoch)
        if step % 2 == 0:
            buffer.settle(step)
    assert served == [0, 1, 2, 3, 4, 5]
    epoch = buffer.rollback(6, data=[4, 5])
    assert [item.batch for item in buffer.claim(7, epoch, 0).data] == [6]


def test_data_is_bounded_ordered_and_leased_again(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=0, data_per_step=1, data_depth=2, checkpoint_interval=1)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    assert [buffer.lease_data("f", 0) for _ in range(3)] == [0, 1, None]
    buffer.commit_data(1, b"one")
    with pytest.raises(ClaimTimeout, match="data_ready 1"):
        buffer.claim(1, epoch, 0)
    driver.client.zadd(f"ddrl:{{{driver.run}}}:data_leases", {"0": 1}, xx=True)
    assert buffer.lease_data("g", 0) == 0, "the feeder died; its unfinished batch comes back"
    buffer.commit_data(0, b"zero")
    buffer.commit_data(0, b"zero")
    assert [item.batch for item in buffer.claim(1, epoch, 0).data] == [0]
    assert payload_keys(driver) == 2, "copies of a batch are not kept"
    with pytest.raises(ReplayError, match="never leased"):
        buffer.commit_data(99, b"x")
    for step in (2, 3):
        number = buffer.lease_data("f", 0)
        if number is not None:
            buffer.commit_data(number, b"x")
        buffer.claim(step, epoch, 0)
    buffer.lease_data("f", 0)
    assert buffer.lease_data("f", 0) is None, "2 + (1 + 1) x 1 = 4 batches are retained until a settle"


def test_corrupt_and_missing_payloads_are_noticed(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    epoch = driver.buffer.rollback(0)
    driver.make(2, 0)
    first, second = driver.buffer.claim(1, epoch, 0).groups
    prefix = f"ddrl:{{{driver.run}}}:payload:"
    driver.client.setrange(prefix + first.ref, 0, b"G")
    with pytest.raises(PayloadCorrupt, match=first.header.checksum.rpartition("/")[2]):
        driver.buffer.fetch(first)
    driver.client.delete(prefix + second.ref)
    with pytest.raises(PayloadMissing):
        driver.buffer.fetch(second)


def test_committed_payloads_never_expire_and_others_do(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    lease = driver.take()
    batch = driver.client.pipeline(transaction=False)
    driver.buffer._payloads.write("stray", [[b"x"]], batch)
    batch.execute()
    driver.commit(lease, 0)
    driver.commit(lease, 0)
    prefix = f"ddrl:{{{driver.run}}}:payload:"
    assert driver.client.ttl(prefix + "stray") > 0
    assert driver.client.ttl(f"{prefix}g0-{lease.token}") == -1


def test_shared_folder_payloads(make_driver: Make, tmp_path: Path) -> None:
    store = FolderPayloads(tmp_path)
    driver = make_driver(payloads=store, groups_per_step=2, data_per_step=1)
    epoch = driver.buffer.rollback(0)
    driver.buffer.commit_data(driver.buffer.lease_data("f", 0), b"latents")
    driver.make(2, 0)
    assert driver.claim(1, epoch) == [0, 1]
    assert payload_keys(driver) == 0
    lost = driver.take()
    driver.buffer.fail(lost, "x")
    assert not driver.commit(lost, 0)
    assert len(list(tmp_path.iterdir())) == 3, "a refused commit leaves no file"
    driver.buffer.publish(1, epoch)
    driver.buffer.settle(1)
    assert list(tmp_path.iterdir()) == []
    driver.buffer.rollback(1)


def test_trash_left_by_a_crash_is_collected_later(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    epoch = driver.buffer.rollback(0)
    driver.step(1, epoch)
    driver.buffer._ledger.settle(1, epoch)  # the process dies before it deletes the payloads
    assert payload_keys(driver) == 1
    driver.again().buffer.rollback(1)
    assert payload_keys(driver) == 0


def test_a_full_server_refuses_commits_but_lets_the_learner_free_memory(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    epoch = driver.buffer.rollback(0)
    lease = driver.take()
    driver.make(1, 0)
    driver.buffer.fail(lease, "x")
    assert driver.commit(driver.take(), 0)
    driver.client.config_set("maxmemory", 1)
    try:
        assert driver.claim(1, epoch) == [0]
        driver.buffer.publish(1, epoch)
        driver.buffer.settle(1, epoch)
        with pytest.raises(ReplayError, match="maxmemory"):
            driver.lease()
    finally:
        driver.client.config_set("maxmemory", 0)
    assert driver.count("settled") == 1


def test_stop_flag(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    assert not driver.buffer.stop_requested()
    driver.buffer.request_stop()
    assert driver.again().buffer.stop_requested()
    driver.buffer.clear_stop()
    assert not driver.buffer.stop_requested()


def test_what_initialise_refuses(client: redis.Redis) -> None:
    with pytest.raises(NotInitialised):
        ReplayBuffer(client, "never", BufferSettings(groups_per_step=1)).counts()
    with pytest.raises(ImpossibleSettings):
        ReplayBuffer(client, "never", BufferSettings(groups_per_step=0)).initialise()
    with pytest.raises(ReplayError, match="braces"):
        ReplayBuffer(client, "a{b}", BufferSettings(groups_per_step=1))
    run = ReplayBuffer(client, "policy", BufferSettings(groups_per_step=1))
    client.config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UnsuitableServer, match="noeviction"):
            run.initialise()
    finally:
        client.config_set("maxmemory-policy", "noeviction")


def test_bad_commits_are_refused_before_anything_is_written(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    lease = driver.take()
    for rewards, version in (([float("nan")], 0), ([], 0), ([1.0], -1)):
        with pytest.raises(ValueError, match=r"rewards|JSON"):
            driver.buffer.commit(lease, b"x", rewards, version)
    assert payload_keys(driver) == 0


def test_producers_and_learner_at_once(make_driver: Make) -> None:
    """Four producers, some dropping their leases, against a learner: bounded, and all accounted for."""
    driver = make_driver(groups_per_step=4, max_staleness=1, window=3, checkpoint_interval=2, lease_s=0.1)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    steps = 15
    done = threading.Event()
    errors: list[BaseException] = []

    def produce(name: str) -> None:
        try:
            made = 0
            while not done.is_set():
                lease = buffer.lease(name, 0.05)
                if lease is None:
                    continue
                made += 1
                if made % 7 == 0:
                    continue  # dies with the lease
                if made % 5 == 0:
                    buffer.fail(lease, "scorer")
                else:
                    driver.commit(lease, max(lease.min_version, buffer.counts()["version"]))
        except BaseException as error:
            errors.append(error)

    producers = [threading.Thread(target=produce, args=(f"p{i}",)) for i in range(4)]
    for producer in producers:
        producer.start()
    trained: list[int] = []
    try:
        for step in range(1, steps + 1):
            claim = buffer.claim(step, epoch, 20)
            for item in claim.groups:
                assert 0 <= step - 1 - item.header.version <= 1
            trained += [item.group for item in claim.groups]
            counts = buffer.counts()
            assert counts["leased"] + counts["ready"] + counts["unpublished"] <= 8
            buffer.publish(step, epoch)
            if step % 2 == 0:
                buffer.settle(step, epoch)
    finally:
        done.set()
        for producer in producers:
            producer.join(10)
    assert errors == []
    assert len(trained) == len(set(trained)) == 4 * steps
