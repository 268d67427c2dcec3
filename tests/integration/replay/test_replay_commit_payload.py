"""A commit and its payload are one: adopted bytes never expire, and bytes that never arrived are not adopted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from replay.records import GroupHeader

Make = Callable[..., Any]


def test_the_first_commit_lifts_the_expiry(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, data_per_step=1)
    lease = driver.take()
    assert driver.commit(lease, 0)
    assert driver.client.ttl(f"ddrl:{{{driver.run}}}:payload:g0-{lease.token}") == -1
    driver.buffer.commit_data(driver.buffer.lease_data("f", 0), b"latents")
    (batch,) = driver.client.keys(f"ddrl:{{{driver.run}}}:payload:d0-*")
    assert driver.client.ttl(batch) == -1


def test_a_payload_that_did_not_arrive_is_not_adopted(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, data_per_step=1)
    ledger = driver.buffer._ledger
    lease = driver.take()
    key = f"ddrl:{{{driver.run}}}:payload:nowhere"
    before = driver.buffer.counts()["bytes"]
    header = GroupHeader([0.0], 1, 0, 5, "0" * 16)
    assert ledger.commit(lease, header, False, "nowhere", [(key, 5)], None, ledger.batch()).status == "unstored"
    number = driver.buffer.lease_data("f", 0)
    assert ledger.commit_data(number, 5, "0" * 16, "nowhere", [(key, 5)], ledger.batch()).status == "unstored"
    counts = driver.buffer.counts()
    assert (counts["ready"], counts["leased"], counts["data_ready"], counts["bytes"]) == (0, 1, 0, before)
    assert driver.commit(lease, 0), "the lease is still good"


def test_a_payload_of_which_one_part_did_not_arrive_is_not_adopted(make_driver: Make) -> None:
    """Whichever part it is, gone or cut short: the others keep their expiry, and the commit can be repeated."""
    driver = make_driver(groups_per_step=1, data_per_step=1, part_bytes=4)
    ledger, prefix = driver.buffer._ledger, f"ddrl:{{{driver.run}}}:payload:"
    lease = driver.take()
    number = driver.buffer.lease_data("f", 0)
    header = GroupHeader([0.0], 1, 0, 12, "0" * 16)
    parts = [(f"{prefix}x.{part}", 4) for part in range(3)]
    for missing, _ in parts:
        for left in (b"", b"abc"):
            for key, _ in parts:
                driver.client.set(key, b"abcd", px=100_000)
            driver.client.set(missing, left, px=100_000) if left else driver.client.delete(missing)
            assert ledger.commit(lease, header, False, "x+3", parts, None, ledger.batch()).status == "unstored"
            assert ledger.commit_data(number, 12, "0" * 16, "x+3", parts, ledger.batch()).status == "unstored"
            assert all(driver.client.pttl(key) > 0 for key, _ in parts if left or key != missing)
    driver.client.delete(*(key for key, _ in parts))
    assert driver.commit(lease, 0)
    assert {driver.client.pttl(key) for key in driver.client.scan_iter(prefix + "*")} == {-1}
    assert len(list(driver.client.scan_iter(prefix + "*"))) == 2
