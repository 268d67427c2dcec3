"""The analytic parts of benchmarks/rollout.py: how work is cut up, how it is served, what the figures mean."""

from __future__ import annotations

import pytest

from benchmarks.sampling.growth import fixed_and_rate, flat
from benchmarks.sampling.stream import next_batch, serve
from benchmarks.sampling.workload import Batch, Job, arrivals, batches, jobs, names, spec, tokens_per_forward


def job(height: int = 16, width: int = 48, steps: int = 10, n: int = 1, tokens: int = 10, group: int = 0) -> Job:
    return Job(height, width, steps, n, 'a sign that says "1"', tokens, group)


def test_the_workload_file_says_what_it_holds() -> None:
    uniform, mixed = jobs("uniform", 10), jobs("mixed", 10)
    assert sum(j.n for j in uniform) == 128
    assert {j.kind for j in uniform} == {(16, 48, 10)}
    assert {j.tokens for j in uniform} == {58}
    assert {(j.height, j.width) for j in mixed} == {(16, 24), (16, 48), (24, 48), (32, 48), (16, 96), (32, 96)}
    assert {j.steps for j in mixed} == {8, 12, 16, 20, 24, 28}
    assert set(names()) == {"uniform", "mixed", "mixed_groups", "small"}
    assert len(spec()["gaps"]) == len(jobs("streaming", 10)) == 128
    assert sum(spec()["gaps"]) / 128 == pytest.approx(1, abs=0.2)


def test_batches_hold_all_work_once_and_keep_the_budget() -> None:
    work = jobs("mixed_groups", 10)
    found = batches(work, 2048)
    for position, one in enumerate(work):
        assert sum(n for batch in found for p, n in batch.parts if p == position) == one.n
    for batch in found:
        assert {work[p].kind for p, _ in batch.parts} == {batch.kind}
        assert batch.samples * work[batch.parts[0][0]].tokens <= 2048


def test_a_batch_is_as_large_as_the_budget_allows_and_crosses_prompts() -> None:
    work = [job(n=3), job(n=3), job(steps=4)]
    assert batches(work, 45) == [Batch((16, 48, 10), ((0, 3), (1, 1))), Batch((16, 48, 10), ((1, 2),)), Batch((16, 48, 4), ((2, 1),))]


def test_a_sample_larger_than_the_budget_runs_alone() -> None:
    assert [b.samples for b in batches([job(n=2, tokens=100)], 45)] == [1, 1]


def test_tokens_per_forward() -> None:
    work = [job(n=4, steps=10), job(n=1, steps=5, height=32)]
    assert tokens_per_forward(work, batches(work, 1000)) == pytest.approx((40 * 10 + 10 * 5) / 15)


def test_arrivals_start_at_zero_and_keep_the_rate() -> None:
    times = arrivals(128, 4.0)
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] == pytest.approx(sum(spec()["gaps"][:127]) / 4)


def test_the_oldest_goes_first_with_its_like() -> None:
    work = [job(height=32), job(), job(n=2), job(), job(n=9)]
    assert next_batch(work, [1, 0, 2, 4, 3], 40, join=True) == Batch((16, 48, 10), ((1, 1), (2, 2), (3, 1)))
    assert next_batch(work, [1, 0, 2], 40, join=False) == Batch((16, 48, 10), ((1, 1),))


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.time += seconds


class OneAtATime:
    """Works 2 s on each request."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.waiting = clock, list[int]()

    def submit(self, position: int) -> None:
        self.waiting.append(position)

    @property
    def busy(self) -> bool:
        return bool(self.waiting)

    def work(self) -> list[int]:
        self.clock.time += 2
        return [self.waiting.pop(0)]


def test_latency_counts_from_the_arrival_even_while_the_server_is_busy() -> None:
    clock = Clock()
    latencies, seconds = serve([0.0, 1.0, 10.0], OneAtATime(clock), clock.now, clock.sleep)
    assert latencies == pytest.approx([2.0, 3.0, 2.0])
    assert seconds == pytest.approx(12.0)


def test_the_line_through_forward_passes() -> None:
    fixed, slope = fixed_and_rate([(n, 0.003 + 2e-5 * n) for n in (50, 100, 400, 1600)])
    assert fixed == pytest.approx(0.003)
    assert slope == pytest.approx(2e-5)


def test_flat_needs_two_doublings_without_gain() -> None:
    assert not flat([10, 10.1])
    assert not flat([10, 15, 15.1])
    assert flat([10, 10.1, 10.2])
    assert flat([10, 15, 15.1, 14])
