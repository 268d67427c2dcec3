"""Serving requests as they arrive, against the wall clock. Who serves is a `Server`; the loop is the same for all."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from benchmarks.sampling.sides import Bench
from benchmarks.sampling.workload import Batch, Job
from diffusion.engine.request import SampleRequest, Trajectory


class Server(Protocol):
    """Takes requests by their position and works on them in pieces."""

    def submit(self, position: int) -> None: ...

    @property
    def busy(self) -> bool:
        """Whether anything waits or runs."""
        ...

    def work(self) -> list[int]:
        """One piece of work that cannot be interrupted; positions of the requests that it finished."""
        ...


def serve(
    arrivals: Sequence[float], server: Server, now: Callable[[], float] = time.perf_counter, sleep: Callable[[float], None] = time.sleep
) -> tuple[list[float], float]:
    """Latency of every request, from its arrival to its last sample, and the seconds from the first arrival to the last finish.

    Args:
        arrivals: ascending times in seconds; the clock starts at 0.
        server: idle.
        now, sleep: the clock.
    """
    start, last = now(), 0.0
    latencies: dict[int, float] = {}
    waiting = deque(enumerate(arrivals))
    while len(latencies) < len(arrivals):
        while waiting and waiting[0][1] <= now() - start:
            server.submit(waiting.popleft()[0])
        if not server.busy:
            sleep(max(0.0, waiting[0][1] - (now() - start)))
            continue
        for position in server.work():
            last = now() - start
            latencies[position] = last - arrivals[position]
    return [latencies[i] for i in range(len(arrivals))], last


class EngineServer:
    """Ours: a piece of work is one denoising step of everything that runs."""

    def __init__(self, bench: Bench, jobs: Sequence[Job]) -> None:
        self._bench, self._jobs, self._engine = bench, jobs, bench.engine()
        self._left: dict[int, tuple[SampleRequest, int, int]] = {}

    def submit(self, position: int) -> None:
        request = self._bench.request(self._jobs[position], rollout=False)
        self._left[id(request)] = request, position, request.n
        self._engine.add_request(request)

    @property
    def busy(self) -> bool:
        return self._engine.unfinished > 0

    def work(self) -> list[int]:
        finished = []
        for one in self._engine.step():
            if not isinstance(one, Trajectory):
                raise RuntimeError(f"a sample failed: {one.reason}")
            request, position, left = self._left.pop(id(one.request))
            if left > 1:
                self._left[id(request)] = request, position, left - 1
            else:
                finished.append(position)
        self._bench.sync()
        return finished


class BatchServer:
    """A rival: the oldest request and every compatible one that waits, up to the budget, from the first step to the last.

    Args:
        bench: policy and budget.
        jobs: requests by position.
        run: samples a batch.
        join: whether requests of one kind share a batch; without, every request is alone.
    """

    def __init__(self, bench: Bench, jobs: Sequence[Job], run: Callable[[Batch], object], join: bool) -> None:
        self._bench, self._jobs, self._run, self._join = bench, jobs, run, join
        self._waiting: list[int] = []

    def submit(self, position: int) -> None:
        self._waiting.append(position)

    @property
    def busy(self) -> bool:
        return bool(self._waiting)

    def work(self) -> list[int]:
        batch = next_batch(self._jobs, self._waiting, self._bench.max_tokens, self._join)
        positions = [p for p, _ in batch.parts]
        self._waiting = [p for p in self._waiting if p not in positions]
        self._run(batch)
        self._bench.sync()
        return positions


def next_batch(jobs: Sequence[Job], waiting: Sequence[int], max_tokens: int, join: bool) -> Batch:
    """The oldest waiting request and, with `join`, all of its kind that fit beside it, in order of arrival. Whole requests only."""
    first = jobs[waiting[0]]
    room = max_tokens // first.tokens - first.n
    parts = [(waiting[0], first.n)]
    for position in waiting[1:] if join else ():
        job = jobs[position]
        if job.kind == first.kind and job.n <= room:
            parts.append((position, job.n))
            room -= job.n
    return Batch(first.kind, tuple(parts))
