"""The scheduler over any arrivals, sizes and durations."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.engine.scheduler import Scheduler

BUDGET = 10


@dataclass(eq=False)
class Job:
    """A request of some tokens that leaves after some steps."""

    number: int
    tokens: int
    steps: int
    arrival: int
    taken: list[int] = field(default_factory=list)


JOBS = st.lists(st.tuples(st.integers(1, BUDGET), st.integers(1, 5), st.integers(0, 6)), max_size=12)


@given(jobs=JOBS)
def test_budget_order_and_end(jobs: list[tuple[int, int, int]]) -> None:
    """Never more tokens than the budget, starts in the order of arrival, no step is missed, everything finishes."""
    ordered = sorted(jobs, key=lambda job: job[2])
    waiting = [Job(i, *job) for i, job in enumerate(ordered)]
    everything = list(waiting)
    scheduler: Scheduler[Job] = Scheduler(BUDGET)
    started: list[int] = []
    limit = 7 + sum(job.steps for job in waiting)
    for tick in range(limit):
        while waiting and waiting[0].arrival <= tick:
            job = waiting.pop(0)
            scheduler.add(job, job.tokens)
        running = scheduler.schedule()
        assert sum(job.tokens for job in running) <= BUDGET
        for job in running:
            if not job.taken:
                started.append(job.number)
            job.taken.append(tick)
        scheduler.finish({id(job) for job in running if len(job.taken) == job.steps})
    assert len(scheduler) == 0
    assert started == [job.number for job in everything]
    assert all(job.taken == list(range(job.taken[0], job.taken[0] + job.steps)) for job in everything)


def test_the_head_of_the_queue_is_not_overtaken_by_a_smaller_request() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    for name, tokens in (("running", 6), ("large", 5), ("small", 1)):
        scheduler.add(name, tokens)
    assert scheduler.schedule() == ["running"]
    assert scheduler.schedule() == ["running"]
    scheduler.finish({id("running")})
    assert scheduler.schedule() == ["large", "small"]


def test_a_request_larger_than_the_budget_is_refused() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    with pytest.raises(ValueError, match=r"one request needs 11 tokens, more than the budget of 10; raise sampler.max_tokens"):
        scheduler.add("x", 11)
    assert len(scheduler) == 0
