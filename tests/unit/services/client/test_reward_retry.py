"""Backoff: deadlines, floors and the shape of the waits, with the clock in the test's hand."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.client.retry import Backoff, retry_after_seconds


@given(st.integers(), st.floats(0.1, 100))
def test_waits_stay_under_cap_and_end_at_the_deadline(seed: int, timeout_s: float) -> None:
    now = 0.0
    backoff = Backoff(timeout_s, base_s=0.2, cap_s=5.0, clock=lambda: now, rng=random.Random(seed))
    for attempt in range(1000):
        wait = backoff.next_wait()
        if wait is None:
            break
        assert 0.0 <= wait <= min(5.0, 0.2 * 2**attempt)
        now += wait + 0.01
        assert now <= timeout_s + 0.01
    else:
        pytest.fail("the deadline never came")


def test_a_floor_is_honoured_or_ends_the_call() -> None:
    backoff = Backoff(10.0, clock=lambda: 0.0)
    wait = backoff.next_wait(at_least_s=7.0)
    assert wait is not None
    assert 7.0 <= wait < 10.0
    assert backoff.next_wait(at_least_s=11.0) is None
    assert backoff.attempts == 2


def test_no_time_left() -> None:
    times = iter([0.0, 3.0, 3.0])
    backoff = Backoff(2.0, clock=lambda: next(times))
    assert backoff.remaining() == 0.0
    assert backoff.next_wait() is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [(None, 0.0), ("", 0.0), ("2", 2.0), ("-3", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after(header: str | None, seconds: float) -> None:
    assert retry_after_seconds(header) == seconds
