"""Calls that arrive again after the ledger has moved on: the network may deliver a retry late."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]


def test_a_late_publish_does_not_lower_the_version(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, checkpoint_interval=3)
    epoch = driver.buffer.rollback(0)
    for step in (1, 2):
        driver.step(step, epoch)
    driver.buffer.publish(1, epoch)
    assert driver.count("version") == 2
    assert driver.take().min_version >= 1, "a sampler must not be told that older weights will do"


def test_a_late_settle_changes_nothing(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, checkpoint_interval=3)
    epoch = driver.buffer.rollback(0)
    for step in (1, 2):
        driver.step(step, epoch)
    driver.buffer.settle(2, epoch)
    before = driver.state()
    driver.buffer.settle(1, epoch)
    assert driver.state() == before
