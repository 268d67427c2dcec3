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
    assert ledger.commit(lease, header, False, "nowhere", key, None, ledger.batch()).status == "unstored"
    number = driver.buffer.lease_data("f", 0)
    assert ledger.commit_data(number, 5, "0" * 16, "nowhere", key, ledger.batch()).status == "unstored"
    counts = driver.buffer.counts()
    assert (counts["ready"], counts["leased"], counts["data_ready"], counts["bytes"]) == (0, 1, 0, before)
    assert driver.commit(lease, 0), "the lease is still good"
