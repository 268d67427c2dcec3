"""Groups a second of the ledger alone: every group is leased, committed with a tiny payload, claimed, published, settled.

With one client, and with several producer processes beside a learner process. As a yardstick, the same number of empty
calls (a script that returns nothing) from one client: what any design with two round trips per group must pay.
"""

from __future__ import annotations

import itertools
import time
from typing import Any

from benchmarks.ledger.crew import work
from benchmarks.stats import interleaved, spread
from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect

RUNS = itertools.count()
TINY = b"x" * 64
GROUPS_PER_STEP = (8, 64)
PRODUCERS = (1, 2, 4)


def one_client(url: str, groups_per_step: int, steps: int) -> dict[str, float]:
    """Whole steps by one client, one call after the other."""
    settings = BufferSettings(groups_per_step=groups_per_step, max_staleness=0)
    client = connect(url)
    buffer = ReplayBuffer(client, f"alone{next(RUNS)}", settings)
    buffer.initialise()
    epoch = buffer.rollback(0)
    begin = time.perf_counter()
    for step in range(1, steps + 1):
        for _ in range(groups_per_step):
            lease = buffer.lease("bench", 0)
            assert lease is not None
            assert buffer.commit(lease, TINY, [0.0, 1.0], step - 1)
        buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
        buffer.settle(step, epoch)
    seconds = time.perf_counter() - begin
    counts = buffer.counts()
    client.close()
    assert counts["settled"] == groups_per_step * steps
    return {"groups/s": groups_per_step * steps / seconds}


def empty_calls(url: str, groups: int) -> dict[str, float]:
    """Two empty script calls per group."""
    client = connect(url)
    script = client.script_load("return 1")
    begin = time.perf_counter()
    for _ in range(2 * groups):
        client.evalsha(script, 1, "empty")
    seconds = time.perf_counter() - begin
    client.close()
    return {"groups/s": groups / seconds}


def measure(url: str, quick: bool) -> dict[str, Any]:
    """Groups a second for each arrangement."""
    groups = 128 if quick else 1536
    sides: dict[str, Any] = {f"1 client, G = {g}": lambda g=g: one_client(url, g, groups // g) for g in GROUPS_PER_STEP}
    sides["1 client, two empty calls per group"] = lambda: empty_calls(url, groups)
    alone = interleaved(sides, repeats=2 if quick else 5)
    rows = [{"arrangement": name, "groups/s": spread(found["groups/s"])} for name, found in alone.items()]
    for producers in PRODUCERS[:1] if quick else PRODUCERS:
        crews = [work(url, producers, 1, 0.5 if quick else 2.0, GROUPS_PER_STEP[-1]) for _ in range(1 if quick else 5)]
        rows.append(
            {
                "arrangement": f"{producers} producer process{'es' * (producers > 1)} + 1 learner process, G = {GROUPS_PER_STEP[-1]}",
                "groups/s": spread([crew["groups/s"] for crew in crews]),
            }
        )
    return {"rows": rows}
