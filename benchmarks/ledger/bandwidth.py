"""Payload bandwidth: our commit and fetch, raw SET and GET, and a Ray queue's put and get, of the same bytes.

One client thread on every side, one server process behind it (Redis, or the queue's actor). Megabytes are 10^6 bytes.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from benchmarks.stats import spread
from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect

MB = 1_000_000
SIZES = {0.1: 120, 1.0: 42, 30.0: 6}
"""Megabytes of a group → groups in one repeat."""
QUICK_SIZES = {0.1: 4, 1.0: 2}
FIGURES = ("commit", "lease+commit", "set", "ray put", "fetch", "claim+fetch", "get", "ray get")
RATIOS = (("commit", "set"), ("lease+commit", "set"), ("fetch", "get"), ("claim+fetch", "get"))
RUNS = itertools.count()


class Clock:
    """Seconds by name of figure."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def once(url: str, queue: Any, payload: bytes, groups: int) -> dict[str, float]:
    """Seconds of every figure for `groups` groups, the sides taking turns group by group, all with one client.

    What slows the machine or the server's log for a moment so meets every side. Read backs: the same way.
    """
    client = connect(url)
    settings = BufferSettings(groups_per_step=groups, max_staleness=0, max_bytes=8 * groups * len(payload) + (1 << 20))
    buffer = ReplayBuffer(client, f"bandwidth{next(RUNS)}", settings)
    buffer.initialise()
    epoch = buffer.rollback(0)
    clock = Clock()

    def commit(i: int) -> None:
        with clock("lease"):
            lease = buffer.lease("bench", 0)
        assert lease is not None
        with clock("commit"):
            assert buffer.commit(lease, payload, [0.0, 1.0], 0)

    def set_(i: int) -> None:
        with clock("set"):
            client.set(f"raw:{i}", payload)

    def put(i: int) -> None:
        with clock("ray put"):
            queue.put(payload)

    take_turns((commit, set_, put), groups)
    with clock("claim"):
        claim = buffer.claim(1, epoch, 0)

    def fetch(i: int) -> None:
        with clock("fetch"):
            assert sum(map(len, buffer.read(claim.groups[i]))) == len(payload)

    def get(i: int) -> None:
        with clock("get"):
            found: Any = client.get(f"raw:{i}")
        assert len(found) == len(payload)

    def pop(i: int) -> None:
        with clock("ray get"):
            assert len(queue.get()) == len(payload)

    take_turns((fetch, get, pop), groups)
    buffer.publish(1, epoch)
    buffer.settle(1, epoch)
    client.unlink(*(f"raw:{i}" for i in range(groups)))
    client.close()
    found = clock.seconds
    return found | {"lease+commit": found["lease"] + found["commit"], "claim+fetch": found["claim"] + found["fetch"]}


def take_turns(sides: Sequence[Callable[[int], None]], rounds: int) -> None:
    """Every side once in each round, in every order in turn: none follows the same other one more often."""
    orders = itertools.cycle(itertools.permutations(sides))
    for i, order in zip(range(rounds), orders, strict=False):
        for side in order:
            side(i)


def raw(url: str, payload: bytes, times: int) -> list[float]:
    """Seconds of writing and reading the payload once, `times` times, raw."""
    client = connect(url)
    found = []
    for _ in range(times):
        begin = time.perf_counter()
        client.set("raw", payload)
        client.get("raw")
        found.append(time.perf_counter() - begin)
    client.unlink("raw")
    client.close()
    return found


@contextmanager
def queue_of_our_own() -> Iterator[Any]:
    """A Ray queue on a local cluster that ends with the block."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray.util.queue import Queue

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=600 * MB)
    queue = Queue()
    try:
        yield queue
    finally:
        queue.shutdown()
        ray.shutdown()


def measure(url: str, quick: bool) -> dict[str, Any]:
    """MB/s of every figure at every size, and ours as a share of raw Redis, repeat by repeat."""
    rows = []
    with queue_of_our_own() as queue:
        for megabytes, groups in (QUICK_SIZES if quick else SIZES).items():
            payload = random.Random(0).randbytes(int(megabytes * MB))
            once(url, queue, payload, groups)  # connections, scripts, warm caches
            repeats = [once(url, queue, payload, groups) for _ in range(2 if quick else 7)]
            total = megabytes * groups
            row: dict[str, Any] = {"mb": megabytes, "groups": groups}
            for figure in FIGURES:
                row[figure] = spread([total / seconds[figure] for seconds in repeats])
            for figure, base in RATIOS:
                row[f"{figure} / {base}"] = spread([seconds[base] / seconds[figure] for seconds in repeats])
            rows.append(row)
    return {"rows": rows}
