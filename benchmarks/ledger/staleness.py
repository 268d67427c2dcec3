"""Staleness, evictions and waiting by bound S and window W: simulated time, real ledger.

A discrete-event simulation decides only when things happen; which group is given out, claimed or evicted is the ledger's
doing. `PRODUCERS` producers sample with the version that is live when they begin; a sampling takes about `SAMPLE_S`
(log-normal), one in `STRAGGLES` takes `STRAGGLER` times as long; an update takes `UPDATE_S`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass, field
from typing import Any

from replay.buffer import BufferSettings, Lease, ReplayBuffer
from replay.connect import connect
from replay.errors import ClaimTimeout, ImpossibleSettings
from replay.policy import staleness, worst_staleness

RUNS = itertools.count()
GROUPS_PER_STEP = 8
PRODUCERS = 12
SAMPLE_S, SAMPLE_SIGMA = 1.0, 0.3
STRAGGLES, STRAGGLER = 20, 5.0
UPDATE_S = 0.6
BOUNDS = (0, 1, 2)
WINDOWS = (1, 4, 16)


@dataclass
class Course:
    """What a simulated run saw; seconds are simulated."""

    seconds: float = 0.0
    claimed: int = 0
    evicted: int = 0
    worst: int = 0
    worst_ready: int = 0
    total_staleness: int = 0
    learner_waits: float = 0.0
    producers_wait: float = 0.0
    idle: dict[int, float] = field(default_factory=dict)


def simulate(url: str, settings: BufferSettings, updates: int, seed: int = 0) -> Course:
    """One run of `updates` updates. Raises ImpossibleSettings."""
    client = connect(url)
    buffer = ReplayBuffer(client, f"staleness{next(RUNS)}", settings)
    buffer.initialise()
    epoch = buffer.rollback(0)
    rng = random.Random(seed)
    course = Course()
    order = itertools.count()
    events: list[tuple[float, int, str, int, Lease | None, int]] = []  # (time, tie, what, producer, lease, version)
    now, version, step = 0.0, 0, 0
    training = False
    learner_free = 0.0
    ready: dict[int, int] = {}  # group → version that sampled it
    course.idle = dict.fromkeys(range(PRODUCERS), 0.0)

    def begin_sampling() -> None:
        for producer in sorted(course.idle):
            lease = buffer.lease(f"p{producer}", 0)
            if lease is None:
                return
            course.producers_wait += now - course.idle.pop(producer)
            seconds = SAMPLE_S * rng.lognormvariate(0.0, SAMPLE_SIGMA) * (STRAGGLER if rng.random() < 1 / STRAGGLES else 1.0)
            heapq.heappush(events, (now + seconds, next(order), "sampled", producer, lease, version))

    while step < updates or training:
        begin_sampling()
        if not training and step < updates:
            try:
                claim = buffer.claim(step + 1, epoch, 0)
            except ClaimTimeout:
                claim = None
            ages = {g: staleness(step + 1, v) for g, v in ready.items()}
            course.worst_ready = max(course.worst_ready, *ages.values(), 0)
            stale = [g for g, age in ages.items() if age > settings.max_staleness]  # what the claim must have evicted
            course.evicted += len(stale)
            for g in stale:
                del ready[g]
            if claim is not None:
                step += 1
                course.learner_waits += now - learner_free
                found = [staleness(step, group.header.version) for group in claim.groups]
                course.worst = max(course.worst, *found)
                course.total_staleness += sum(found)
                course.claimed += len(found)
                for group in claim.groups:
                    del ready[group.group]
                training = True
                heapq.heappush(events, (now + UPDATE_S, next(order), "trained", -1, None, step))
            elif course.idle:
                begin_sampling()  # what the claim evicted has freed its slots
        now, _, what, producer, lease, made_by = heapq.heappop(events)
        if what == "trained":
            training, learner_free, version = False, now, made_by
            buffer.publish(version, epoch)
            buffer.settle(version, epoch)
        elif lease is not None:
            assert buffer.commit(lease, b"x", [0.0, 1.0], made_by)
            ready[lease.group] = made_by
            course.idle[producer] = now
    counts = buffer.counts()
    if (counts["evicted"], counts["evicted:stale"]) != (course.evicted, course.evicted):
        raise SystemExit(f"{course.evicted} groups became too old, the ledger evicted {counts['evicted']}")
    course.seconds = now
    course.producers_wait += sum(now - since for since in course.idle.values())
    client.close()
    return course


def measure(url: str, quick: bool) -> dict[str, Any]:
    """One row for every (S, W)."""
    updates = 6 if quick else 150
    rows: list[dict[str, Any]] = []
    for bound, window in itertools.product(BOUNDS, WINDOWS):
        settings = BufferSettings(groups_per_step=GROUPS_PER_STEP, max_staleness=bound, window=window, lease_s=3600.0)
        row: dict[str, Any] = {"S": bound, "W": window}
        try:
            course = simulate(url, settings, updates)
        except ImpossibleSettings as error:
            rows.append(row | {"refused": str(error)})
            continue
        row |= {
            "bound_of_pacing": worst_staleness(settings),
            "worst_before_eviction": course.worst_ready,
            "worst_at_claim": course.worst,
            "mean_at_claim": course.total_staleness / course.claimed,
            "evicted_share": course.evicted / (course.claimed + course.evicted),
            "learner_waits_share": course.learner_waits / course.seconds,
            "producers_wait_share": course.producers_wait / course.seconds / PRODUCERS,
            "updates_per_s": updates / course.seconds,
        }
        rows.append(row)
    return {"updates": updates, "producers": PRODUCERS, "groups_per_step": GROUPS_PER_STEP, "straggler_share": 1 / STRAGGLES, "rows": rows}
