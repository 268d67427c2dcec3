"""Groups scored by one revision of a reward are never trained on by a run that expects another."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from replay.buffer import ReplayBuffer
from replay.errors import ClaimTimeout

Make = Callable[..., Any]
OLD, NEW = {"ocr": "r1", "sharpness": "r1"}, {"sharpness": "r1", "ocr": "r2"}
SCORES = {"ocr": [0.5, None], "sharpness": [1.0, 2.0]}


def make(driver: Any, count: int, version: int, revisions: dict[str, str], scores: Any = SCORES) -> list[int]:
    """Lease, then commit; the groups that were accepted."""
    leases = [driver.take() for _ in range(count)]
    return [lease.group for lease in leases if driver.commit(lease, version, revisions=revisions, scores=scores)]


def payloads(driver: Any) -> int:
    return len(list(driver.client.scan_iter(f"ddrl:{{{driver.run}}}:payload:*")))


def test_scores_and_revisions_travel_in_the_header(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2)
    epoch = driver.buffer.rollback(0)
    make(driver, 1, 0, OLD)
    driver.make(1, 0)
    scored, plain = driver.buffer.claim(1, epoch, 0).groups
    assert (scored.header.rewards, scored.header.scores, scored.header.revisions) == ([1.0, 2.0], SCORES, OLD)
    assert (plain.header.scores, plain.header.revisions) == ({}, {})


@pytest.mark.parametrize(
    ("scores", "revisions", "words"),
    [
        ({"ocr": [1.0]}, {"ocr": "r1"}, "'ocr' has 1 scores, the group has 2 members"),
        ({"ocr": [1.0, 2.0]}, {}, r"scores of \['ocr'\] but revisions of \[\]"),
        ({"ocr": [1.0, 2.0]}, OLD, "must name the same rewards"),
        ({"ocr": [1.0, float("nan")]}, {"ocr": "r1"}, "JSON"),
    ],
)
def test_scores_that_do_not_fit_are_refused_before_anything_is_written(make_driver: Make, scores: Any, revisions: Any, words: str) -> None:
    driver = make_driver(groups_per_step=1)
    lease = driver.take()
    with pytest.raises(ValueError, match=words):
        driver.commit(lease, 0, scores=scores, revisions=revisions)
    assert payloads(driver) == 0
    assert driver.count("leased") == 1


def test_ready_groups_of_a_changed_reward_are_evicted_and_replaced(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_staleness=1)
    buffer: ReplayBuffer = driver.buffer
    epoch = buffer.rollback(0)
    assert buffer.expect_rewards(OLD) == 0
    assert make(driver, 3, 0, OLD) == [0, 1, 2]
    held = driver.take()
    assert driver.lease() is None
    assert buffer.expect_rewards(dict(reversed(OLD.items()))) == 0, "the order of the names does not matter"
    assert buffer.expect_rewards(NEW) == 3
    assert buffer.expect_rewards(NEW) == 0
    counts = buffer.counts()
    assert (counts["evicted:reward"], counts["evicted"], counts["ready"], counts["bytes"], counts["trash"]) == (3, 3, 0, 0, 0)
    assert payloads(driver) == 0
    assert not driver.commit(held, 0, revisions=OLD, scores=SCORES), "the producer drops it and goes on"
    assert not driver.commit(held, 0, revisions=OLD, scores=SCORES)
    assert driver.count("evicted:reward") == 4
    with pytest.raises(ClaimTimeout, match=r'group 3 was scored by \{"ocr":"r1","sharpness":"r1"\}, the run expects \{"ocr":"r2","sharpness":"r1"\}'):
        buffer.claim(1, epoch, 0)
    assert make(driver, 4, 0, NEW) == [4, 5, 6, 7], "the slots are free"
    assert driver.claim(1, epoch) == [4, 5]


def test_a_group_that_names_no_rewards_does_not_match(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=1)
    driver.make(1, 0)
    assert driver.buffer.expect_rewards(NEW) == 1
    assert not driver.commit(driver.take(), 0)
    assert driver.count("evicted:reward") == 2
    assert driver.buffer.expect_rewards({}) == 0
    older = driver.make(1, 0)[0]
    driver.client.hdel(f"ddrl:{{{driver.run}}}:group:{older}", "revisions")  # as in a ledger that did not keep them
    assert driver.buffer.expect_rewards(NEW) == 1
    driver.buffer.expect_rewards({})
    assert driver.make(2, 0) == [3, 4], "a run that expects none in particular takes any"


def test_zero_variance_does_not_hide_a_changed_reward(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, drop_zero_variance=True)
    driver.buffer.expect_rewards(NEW)
    assert not driver.buffer.commit(driver.take(), b"flat", [1.0, 1.0], 0, revisions=OLD)
    counts = driver.buffer.counts()
    assert (counts["evicted:reward"], counts["evicted:zero_variance"]) == (1, 0)


def history(driver: Any) -> tuple[int, dict[int, Any]]:
    """Three steps by the old reward, the first settled, and two groups ready: (epoch, claims)."""
    buffer = driver.buffer
    buffer.expect_rewards(OLD)
    epoch, claims = buffer.rollback(0), {}
    for step in (1, 2, 3):
        number = buffer.lease_data("feeder", 0)
        buffer.commit_data(number, b"batch %d" % number)
        make(driver, 2, step - 1, OLD)
        claims[step] = buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
    buffer.settle(1)
    make(driver, 2, 3, OLD)
    return epoch, claims


SETTINGS = {"groups_per_step": 2, "data_per_step": 1, "checkpoint_interval": 3}


def test_a_resume_with_the_same_rewards_serves_the_same_compositions(make_driver: Make) -> None:
    driver = make_driver(**SETTINGS)
    buffer = driver.buffer
    _, claims = history(driver)
    assert buffer.expect_rewards(OLD) == 0
    epoch = buffer.rollback(1, [0, 1], [0])
    for step in (2, 3):
        again = buffer.claim(step, epoch, 0)
        assert (again.groups, again.data) == (claims[step].groups, claims[step].data)
    assert driver.count("evicted:reward") == 0


def test_a_resume_with_other_rewards_forms_the_later_steps_anew(make_driver: Make) -> None:
    driver = make_driver(**SETTINGS)
    buffer = driver.buffer
    old, claims = history(driver)
    assert buffer.expect_rewards(NEW) == 2, "the ready ones"
    assert buffer.claim(3, old, 0) == claims[3], "ranks that are at it see one composition"
    epoch = buffer.rollback(1, [0, 1], [0])
    counts = buffer.counts()
    assert (counts["evicted:reward"], counts["evicted"], counts["claimed"], counts["unpublished"]) == (6, 6, 0, 0)
    assert (counts["claimed_step"], counts["settled"], counts["data_ready"]) == (1, 2, 2)
    assert payloads(driver) == 2, "the data batches"
    assert buffer.audit() == []
    assert make(driver, 2, 1, NEW) == [8, 9]
    again = buffer.claim(2, epoch, 0)
    assert [group.group for group in again.groups] == [8, 9]
    assert again.data == claims[2].data, "a data batch is a function of its index"
    assert buffer.fetch(again.data[0]) == b"batch 1"
    buffer.publish(2, epoch)
    make(driver, 2, 2, NEW)
    assert buffer.claim(3, epoch, 0).data == claims[3].data
    buffer.publish(3, epoch)
    buffer.settle(3, epoch)
    assert buffer.counts()["settled"] == 6


def test_only_the_claims_from_the_first_other_one_on_are_taken_apart(make_driver: Make) -> None:
    """The reward changes while the run goes on: steps it was not used in keep their composition."""
    driver = make_driver(**SETTINGS)
    buffer = driver.buffer
    buffer.expect_rewards(OLD)
    epoch, compositions = buffer.rollback(0), {}
    for step, revisions in ((1, OLD), (2, NEW), (3, OLD)):
        buffer.expect_rewards(revisions)
        number = buffer.lease_data("feeder", 0)
        buffer.commit_data(number, b"x")
        make(driver, 2, step - 1, revisions)
        compositions[step] = buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
    epoch = buffer.rollback(0)
    assert buffer.claim(1, epoch, 0).groups == compositions[1].groups
    counts = buffer.counts()
    assert (counts["claimed_step"], counts["claimed"], counts["evicted:reward"]) == (1, 2, 4), "step 3 came after step 2, and falls with it"


def test_a_group_cut_off_and_made_again_is_judged_by_its_new_rewards(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_staleness=1, checkpoint_interval=4, remake_cut_off=True)
    buffer = driver.buffer
    epoch = buffer.rollback(0)
    make(driver, 1, 0, OLD)
    driver.claim(1, epoch)
    buffer.publish(1, epoch)
    make(driver, 1, 1, OLD)
    epoch = buffer.rollback(0)
    assert driver.count("remade") == 1
    assert buffer.expect_rewards(NEW) == 0, "it holds nothing that was scored"
    assert buffer.claim(1, epoch, 0).groups[0].header.revisions == OLD
    buffer.publish(1, epoch)
    assert make(driver, 1, 1, NEW) == [1]
