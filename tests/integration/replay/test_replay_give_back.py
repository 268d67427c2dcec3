"""A lease that is given back for want of infrastructure costs no attempt; one that failed or ran out does."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]


def set_pause(driver: Any, ms: int) -> None:
    driver.client.hset(f"ddrl:{{{driver.run}}}:meta", "pause_ms", ms)


def pass_the_pause(driver: Any, group: int) -> None:
    """As if the pause of a group that was given back were over."""
    assert driver.client.hset(f"ddrl:{{{driver.run}}}:group:{group}", "rests", 1) == 0


def test_giving_back_costs_no_attempt(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_attempts=2)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    for _ in range(5):
        lease = driver.take()
        assert lease.group == 0
        buffer.give_back(lease, "the weights of version 0\n did not come")
        buffer.give_back(lease, "a repeat after a lost reply")
        assert not driver.commit(lease, 0), "its token is revoked"
        assert not buffer.extend(lease)
        pass_the_pause(driver, 0)
    counts = buffer.counts()
    assert (counts["given_back"], counts["waiting"], counts["failed"], counts["dead"], counts["deaths"]) == (5, 1, 0, 0, 0)
    assert buffer._ledger.last_failure() == "group 0 was given back: the weights of version 0 did not come"
    buffer.fail(driver.take(), "this one counts")
    lease = driver.take()
    assert (lease.group, lease.attempt) == (0, 7)
    driver.expire(lease)
    assert driver.take().group == 1, "a lease that ran out costs an attempt: what kills its producer must not live for ever"
    assert [letter.reasons for letter in buffer.dead_letters()] == [["this one counts", "lease expired (a)"]]
    assert epoch == 1


def test_a_group_given_back_goes_to_the_front_and_to_its_owner_after_a_pause(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    set_pause(driver, 60_000)
    first, second = driver.take("a"), driver.take("a")
    driver.buffer.give_back(second, "no weights")
    driver.buffer.give_back(first, "no weights")
    assert driver.lease("a") is None, "who cannot work asks again without haste"
    assert driver.take("b").group == 0, "anyone else gets it at once, the lowest index first"
    assert driver.lease("a") is None, "nor does it pass the front and open a new index"
    driver.buffer.fail(driver.take("b"), "b gave this one back never")
    set_pause(driver, 150)
    driver.buffer.give_back(driver.take("b"), "no weights")
    given_back = time.monotonic()
    again = driver.buffer.lease("b", 10)
    assert again is not None
    assert again.group == 1
    assert time.monotonic() - given_back > 0.14


def test_the_pause_ends_with_the_next_lease(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    set_pause(driver, 60_000)
    driver.buffer.give_back(driver.take("a"), "no weights")
    driver.buffer.fail(driver.take("b"), "no text")
    assert driver.take("b").group == 0, "b gave nothing back"


def test_a_lease_that_was_lost_gives_nothing_back(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1)
    stolen = driver.take("a")
    driver.expire(stolen)
    holder = driver.take("b")
    before = driver.state()
    driver.buffer.give_back(stolen, "too late")
    assert driver.state() == before
    assert driver.commit(holder, 0)
