"""Latency of each operation at rest: one client, one call after the other; and the part of it the server takes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import redis

from benchmarks.stats import percentile
from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect

RUNS = itertools.count()
TINY = b"x" * 64
GROUPS_PER_STEP = 8


def server_us(client: redis.Redis) -> tuple[int, int]:
    """(script calls, microseconds in them) since the server started."""
    info: Any = client.info("commandstats")
    found: dict[str, Any] = info.get("cmdstat_evalsha", {"calls": 0, "usec": 0})
    return int(found["calls"]), int(found["usec"])


class Watch:
    """Times calls by kind: the client's clock and the server's counters around each."""

    def __init__(self, client: redis.Redis) -> None:
        self._client = client
        self.ms: dict[str, list[float]] = {}
        self.server: dict[str, list[int]] = {}

    def time(self, name: str, call: Callable[[], Any]) -> Any:
        before = server_us(self._client)
        begin = time.perf_counter()
        reply = call()
        self.ms.setdefault(name, []).append(1e3 * (time.perf_counter() - begin))
        after = server_us(self._client)
        totals = self.server.setdefault(name, [0, 0])
        totals[0] += after[0] - before[0]
        totals[1] += after[1] - before[1]
        return reply


def measure(url: str, quick: bool) -> dict[str, Any]:
    """p50 and p99 of each operation, client side, with the server's mean share."""
    steps = 8 if quick else 150
    client = connect(url)
    watch = Watch(client)
    buffer = ReplayBuffer(client, f"latency{next(RUNS)}", BufferSettings(groups_per_step=GROUPS_PER_STEP, max_staleness=0))
    buffer.initialise()
    epoch = buffer.rollback(0)
    for step in range(1, steps + 1):
        leases = [watch.time("lease", lambda: buffer.lease("bench", 0)) for _ in range(GROUPS_PER_STEP)]
        for lease in leases:
            watch.time("extend", partial(buffer.extend, lease))
        for lease in leases:
            watch.time("commit", partial(buffer.commit, lease, TINY, [0.0, 1.0], step - 1))
        watch.time("claim", partial(buffer.claim, step, epoch, 0))
        watch.time("claim again", partial(buffer.claim, step, epoch, 0))
        watch.time("publish", partial(buffer.publish, step, epoch))
        watch.time("settle", partial(buffer.settle, step, epoch))
        watch.time("counts", buffer.counts)
    client.close()
    rows = []
    for name, values in watch.ms.items():
        calls, microseconds = watch.server[name]
        row = {"operation": name, "n": len(values), "p50_ms": percentile(values, 0.5), "p99_ms": percentile(values, 0.99)}
        rows.append(row | {"server_ms": microseconds / 1e3 / max(1, calls)})
    return {"groups_per_step": GROUPS_PER_STEP, "rows": rows}
