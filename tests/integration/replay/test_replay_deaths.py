"""Dead groups as others see them: how many since a start, which was the first, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Make = Callable[..., Any]


def kill(driver: Any, reason: str, prompt: str = "") -> int:
    lease = driver.take()
    driver.buffer.fail(lease, reason, prompt)
    return int(lease.group)


def test_deaths_since_a_start_leave_out_the_older_ones(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=4, max_attempts=1)
    buffer = driver.buffer
    assert buffer.first_death() is None
    assert buffer.rollback(0) == 1
    old = [kill(driver, "the reward service was down"), kill(driver, "still down")]
    resumed = driver.again().buffer
    since = resumed.counts()["deaths"]
    assert since == 2
    assert resumed.dead_letters(since) == []
    assert resumed.first_death(since) is None
    assert resumed.rollback(0) == 2
    new = [kill(driver, "no text found", 'a sign that says\n"exit"'), kill(driver, "another reason")]
    assert resumed.counts()["deaths"] - since == 2
    assert [letter.group for letter in resumed.dead_letters(since)] == list(reversed(new))
    assert [letter.group for letter in resumed.dead_letters()] == list(reversed(old + new))
    first = resumed.first_death(since)
    assert first is not None
    assert (first.group, first.reasons, first.number, first.epoch) == (2, ["no text found"], 3, 2)
    assert first.prompt == 'a sign that says "exit"'
    earliest = resumed.first_death()
    assert earliest is not None
    assert (earliest.group, earliest.epoch, earliest.prompt) == (0, 1, "")
    assert 0 < earliest.died_at <= first.died_at


def test_a_group_made_again_does_not_take_its_death_back(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_attempts=1)
    buffer = driver.buffer
    kill(driver, "first")
    assert buffer.requeue(0)
    assert driver.take().group == 0
    counts = buffer.counts()
    assert (counts["dead"], counts["deaths"]) == (0, 1)
    assert buffer.first_death() is None, "alive again"
    assert driver.client.hlen(f"ddrl:{{{driver.run}}}:deaths") == 0


def test_the_prompt_of_an_earlier_attempt_is_kept(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=1, max_attempts=2)
    kill(driver, "no text", "a prompt")
    driver.expire(driver.take())
    driver.take()
    letter = driver.buffer.first_death()
    assert (letter.prompt, letter.reasons) == ("a prompt", ["no text", "lease expired (a)"])


def test_letters_of_a_ledger_that_did_not_number_deaths(make_driver: Make) -> None:
    driver = make_driver(groups_per_step=2, max_attempts=1)
    kill(driver, "old")
    driver.client.delete(f"ddrl:{{{driver.run}}}:deaths")
    driver.client.hdel(f"ddrl:{{{driver.run}}}:meta", "deaths")
    buffer = driver.again().buffer
    since = buffer.counts()["deaths"]
    assert since == 1
    kill(driver, "new")
    assert [(letter.group, letter.number) for letter in buffer.dead_letters()] == [(1, 2), (0, 0)]
    assert [letter.reasons for letter in buffer.dead_letters(since)] == [["new"]]
