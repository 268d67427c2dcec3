"""How cost grows from 1 to 64 simulated producers, as threads spread over at most four processes.

Flat out, all of them ask again at once: the rate shows where the ledger (or the cores) saturate, and latency is the
queue in front of it. At a pace of one group every 200 ms each, latency shows what a producer that also samples pays.
"""

from __future__ import annotations

from typing import Any

from benchmarks.ledger.crew import work
from benchmarks.stats import spread

COUNTS = (1, 4, 16, 64)
PROCESSES = 4
PACE_S = 0.2
GROUPS_PER_STEP = {"flat out": 64, "paced": 8}
FIGURES = ("groups/s", "lease_ms 0.5", "lease_ms 0.99", "commit_ms 0.5", "commit_ms 0.99")


def measure(url: str, quick: bool) -> dict[str, Any]:
    """Rates and latencies for every number of producers, flat out and paced; repeats take turns over the numbers."""
    counts = (1, 8) if quick else COUNTS
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for _ in range(1 if quick else 5):
        for count in counts:
            processes = min(count, PROCESSES)
            for mode, pace_s in (("flat out", 0.0), ("paced", PACE_S)):
                crew = work(url, processes, count // processes, (0.5 if quick else 1.5) + 10 * pace_s, GROUPS_PER_STEP[mode], pace_s)
                found.setdefault((mode, count), []).append(crew)
    rows = [
        {"mode": mode, "producers": count, "processes": crews[0]["processes"], **{name: spread([crew[name] for crew in crews]) for name in FIGURES}}
        for (mode, count), crews in sorted(found.items())
    ]
    return {"pace_s": PACE_S, "rows": rows}
