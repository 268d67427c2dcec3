"""The scheduler over any arrivals, sizes, durations and priorities: the invariants that its module states, by number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion.engine.scheduler import Scheduler

BUDGET, PATIENCE = 10, 4


@dataclass(eq=False)
class Job:
    """A sequence of some tokens that leaves after some steps. `branches` more of it, as long, follow from it."""

    tokens: int
    steps: int
    arrival: int
    priority: int = 0
    branches: int = 0
    taken: list[int] = field(default_factory=list)


JOBS = st.lists(
    st.builds(Job, st.integers(1, BUDGET), st.integers(1, 5), st.integers(0, 12), st.integers(0, 2), st.integers(0, 3)),
    max_size=12,
).map(lambda jobs: [Job(j.tokens, j.steps, j.arrival, j.priority, j.branches) for j in sorted(jobs, key=lambda j: j.arrival)])


def simulate(jobs: list[Job], each_tick: Callable[[int, Scheduler[Job], list[Job]], None] | None = None) -> list[Job]:
    """Run all jobs to their end, one tick after the other; returns them with their branches. Fails when one never ends."""
    scheduler: Scheduler[Job] = Scheduler(BUDGET, PATIENCE)
    waiting, everything = list(jobs), list(jobs)
    total = sum(j.steps * (1 + j.branches) for j in jobs)
    for tick in range(14 + 2 * total):
        while waiting and waiting[0].arrival <= tick:
            job = waiting.pop(0)
            scheduler.add(job, job.tokens, job.priority)
        running = scheduler.schedule()
        for job in running:
            job.taken.append(tick)
        if each_tick is not None:
            each_tick(tick, scheduler, running)
        done = [job for job in running if len(job.taken) == job.steps]
        for job in done:
            for _ in range(job.branches):
                child = Job(job.tokens, job.steps, tick)
                everything.append(child)
                scheduler.add(child, child.tokens, like=job)
        scheduler.finish(done)
    assert len(scheduler) == 0
    return everything


@given(jobs=JOBS)
def test_1_the_budget_holds_and_everything_finishes(jobs: list[Job]) -> None:
    def check(tick: int, scheduler: Scheduler[Job], running: list[Job]) -> None:
        assert sum(job.tokens for job in running) <= BUDGET
        assert len(set(map(id, running))) == len(running)

    assert all(len(job.taken) == job.steps for job in simulate(jobs, check))


@given(jobs=JOBS)
def test_2_what_runs_takes_part_in_every_tick(jobs: list[Job]) -> None:
    for job in simulate(jobs):
        assert job.taken == list(range(job.taken[0], job.taken[0] + job.steps))


@given(jobs=JOBS, at=st.integers(0, 10), budget=st.integers(1, BUDGET))
def test_2_after_the_budget_fell_what_runs_takes_turns(jobs: list[Job], at: int, budget: int) -> None:
    limit, beside = BUDGET, list[int]()

    def check(tick: int, scheduler: Scheduler[Job], running: list[Job]) -> None:
        nonlocal limit
        assert sum(job.tokens for job in running) <= limit or len(running) == 1
        beside.append(scheduler.running)
        for job in jobs:  # nobody that has begun waits longer than there were sequences when it last took part
            if job.taken and len(job.taken) < job.steps:
                assert tick - job.taken[-1] <= beside[job.taken[-1]]
        if tick == at:
            scheduler.lower_budget(budget)
            limit = budget

    assert all(len(job.taken) == job.steps for job in simulate(jobs, check))


@given(jobs=JOBS)
def test_3_equal_sequences_start_in_the_order_of_arrival_and_priority_is_a_head_start(jobs: list[Job]) -> None:
    for job in jobs:
        job.tokens, job.branches = 3, 0
    simulate(jobs)
    for i, early in enumerate(jobs):
        for late in jobs[i + 1 :]:
            if late.arrival - early.arrival >= PATIENCE * (late.priority - early.priority):
                assert early.taken[0] <= late.taken[0]
            elif late.arrival <= early.taken[0] - 1:  # it was there in time
                assert late.taken[0] <= early.taken[0]


@given(jobs=JOBS)
def test_4_a_large_sequence_is_overtaken_for_a_while_only(jobs: list[Job]) -> None:
    """From `patience` ticks after its arrival on, whatever begins before a sequence stood before it in the order."""
    for job in jobs:
        job.priority = job.branches = 0
    simulate(jobs)
    for i, job in enumerate(jobs):
        overtaking = [other for other in jobs[i + 1 :] if other.arrival > job.arrival and other.taken[0] < job.taken[0]]
        assert all(other.taken[0] <= job.arrival + PATIENCE for other in overtaking)


def test_the_worked_example_of_the_module() -> None:
    scheduler: Scheduler[str] = Scheduler(10, patience=2)
    scheduler.add("a", 6)
    assert scheduler.schedule() == ["a"]
    scheduler.add("b", 6)
    scheduler.add("c", 4)
    assert scheduler.schedule() == ["a", "c"]
    assert scheduler.schedule() == ["a", "c"]
    scheduler.finish(["c"])
    scheduler.add("d", 4)
    assert scheduler.schedule() == ["a"]
    scheduler.finish(["a"])
    assert scheduler.schedule() == ["b", "d"]


def test_a_hold_lets_what_runs_and_its_branches_finish_and_nothing_else_begin() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    scheduler.add("trunk", 2)
    assert scheduler.schedule() == ["trunk"]
    scheduler.add("new", 2)
    scheduler.hold = True
    assert scheduler.schedule() == ["trunk"]
    scheduler.add("branch", 2, like="trunk")
    scheduler.finish(["trunk"])
    assert scheduler.started
    assert scheduler.schedule() == ["branch"]
    scheduler.finish(["branch"])
    assert not scheduler.started
    assert scheduler.schedule() == []
    scheduler.hold = False
    assert scheduler.schedule() == ["new"]


def test_branches_stand_where_their_trunk_stood() -> None:
    scheduler: Scheduler[str] = Scheduler(4)
    scheduler.add("trunk", 4)
    scheduler.schedule()
    scheduler.add("later", 4)
    for name in ("first", "second"):
        scheduler.add(name, 4, like="trunk")
    scheduler.finish(["trunk"])
    order = []
    for _ in range(3):
        order += scheduler.schedule()
        scheduler.finish(order)
    assert order == ["first", "second", "later"]


def test_removal_frees_the_room_of_waiting_and_running_sequences() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    for name in ("x1", "x2", "y1", "x3"):
        scheduler.add(name, 5)
    assert scheduler.schedule() == ["x1", "x2"]
    assert scheduler.remove(lambda s: s.startswith("x")) == ["x3", "x1", "x2"]
    assert scheduler.schedule() == ["y1"]
    assert (scheduler.running, scheduler.waiting, len(scheduler)) == (1, 0, 1)


def test_one_sequence_larger_than_the_budget_runs_alone() -> None:
    scheduler: Scheduler[str] = Scheduler(10)
    scheduler.add("huge", 11)
    scheduler.add("small", 1)
    assert scheduler.schedule() == ["huge"]
    scheduler.finish(["huge"])
    assert scheduler.schedule() == ["small"]


@pytest.mark.parametrize("values", [(0, 1), (1, 0)])
def test_impossible_settings_are_refused(values: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        Scheduler(*values)
