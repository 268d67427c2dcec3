"""Work cut into parcels, dealt out to workers that may be slow, silent or dead. `Deal` is pure: no Ray, no clock of its own.

    waiting ─► asked for, of one worker ─► answered                the first answer counts
       ▲            ├─ the worker died ─► waiting                  that worker rests for `REST_S`
       └────────────┴─ not back after `LATE_S` and somebody idle ─► asked for of that one too

Invariants: a worker has at most `IN_FLIGHT` parcels; the lowest parcel is asked for first; a parcel is answered once. Results are those of
the parcels, whoever does them, so they may be done twice.

A worked example, two workers, five parcels: `ask` → (0, A), (1, B), (2, A), (3, B); B dies → 1 and 3 wait; A answers 0 → `ask` → (1, A).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any

IN_FLIGHT = 2
"""Parcels of one worker: the next one is there when it is done with the first."""
LATE_S = 300.0
"""After which a parcel that is not back is given to an idle worker too."""
REST_S = 5.0
"""For which a worker that died, and is started again, is asked for nothing."""
SILENCE_S = 1800.0
"""Without an answer of any worker, after which the work is given up."""
LOOK_S = 1.0
"""How often late and resting workers are looked at."""


class Silence(Exception):
    """No worker answered any more."""


class Deal:
    """Who is asked for what.

    Args:
        parcels: how many there are, numbered from 0.
        workers: how many there are, numbered from 0; at least one.
        now: time in seconds of the clock that every method is told.
    """

    def __init__(self, parcels: int, workers: int, now: float) -> None:
        self._waiting, self._workers, self._sign = list(range(parcels)), workers, now
        self._asked: dict[tuple[int, int], float] = {}
        self._open = set(self._waiting)
        self._resting: dict[int, float] = {}
        self._last_death = ""

    @property
    def over(self) -> bool:
        """Whether every parcel was answered."""
        return not self._open

    def ask(self, now: float) -> list[tuple[int, int]]:
        """(parcel, worker) to ask now. Raises Silence when nobody has answered for too long."""
        if now > self._sign + SILENCE_S:
            died = f"; the last that died: {self._last_death}" if self._last_death else ""
            raise Silence(f"{len(self._open)} parcels are not back, and none of {self._workers} workers has answered for {SILENCE_S:.0f} s{died}")
        asked: list[tuple[int, int]] = []
        while self._waiting:
            worker = min(self._awake(now), key=self._load, default=None)
            if worker is None or self._load(worker) >= IN_FLIGHT:
                return asked
            asked.append(self._give(self._waiting.pop(0), worker, now))
        for parcel, since in sorted((p, t) for (p, _), t in self._asked.items() if p in self._open):
            idle = next((w for w in self._awake(now) if not self._load(w)), None)
            if idle is not None and now > since + LATE_S and sum(p == parcel for p, _ in self._asked) == 1:
                asked.append(self._give(parcel, idle, now))
        return asked

    def answered(self, parcel: int, worker: int, now: float) -> bool:
        """A parcel is back; whether it is the first time."""
        self._asked.pop((parcel, worker), None)
        self._sign = now
        first = parcel in self._open
        self._open.discard(parcel)
        if first and parcel in self._waiting:
            self._waiting.remove(parcel)
        return first

    def died(self, parcel: int, worker: int, now: float, why: str = "") -> None:
        """A worker will not bring a parcel back."""
        self._asked.pop((parcel, worker), None)
        self._resting[worker], self._last_death = now + REST_S, why
        if parcel in self._open and parcel not in self._waiting and not any(p == parcel for p, _ in self._asked):
            self._waiting = sorted([*self._waiting, parcel])

    def _give(self, parcel: int, worker: int, now: float) -> tuple[int, int]:
        self._asked[parcel, worker] = now
        return parcel, worker

    def _awake(self, now: float) -> list[int]:
        return [w for w in range(self._workers) if now >= self._resting.get(w, now)]

    def _load(self, worker: int) -> int:
        return sum(w == worker for _, w in self._asked)


def each(workers: Sequence[Any], method: str, calls: Sequence[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Ask Ray actors for `method(*call)` of every call; (its number, its result) as they come.

    Raises:
        Silence: see `Deal.ask`.
        Exception: what a worker raised, as it raised it.
    """
    deal = Deal(len(calls), len(workers), time.monotonic())
    futures: dict[Future[Any], tuple[int, int]] = {}
    while not deal.over:
        for parcel, worker in deal.ask(time.monotonic()):
            # not asked again by Ray, which would wait for this very worker
            reference = getattr(workers[worker], method).options(max_task_retries=0).remote(*calls[parcel])
            futures[reference.future()] = parcel, worker
        if not futures:  # all workers rest
            time.sleep(LOOK_S)
        for future in wait(futures, LOOK_S, FIRST_COMPLETED).done:
            parcel, worker = futures.pop(future)
            error = future.exception()
            if error is None:
                if deal.answered(parcel, worker, time.monotonic()):
                    yield parcel, future.result()
            elif _lost(error):
                deal.died(parcel, worker, time.monotonic(), f"{type(error).__name__}: {error}")
            else:
                raise getattr(error, "cause", None) or error


def _lost(error: BaseException) -> bool:
    """Whether it is the worker or the way that ended, and not the work that failed."""
    from ray.exceptions import RayError, RayTaskError

    return isinstance(error, RayError) and not isinstance(error, RayTaskError)
