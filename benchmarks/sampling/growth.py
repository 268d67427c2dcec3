"""What batching gains: throughput by the number of requests in flight, and why it ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.sampling.sides import Bench
from benchmarks.sampling.workload import PATCH, Job
from benchmarks.stats import interleaved, spread

SIZES = ((16, 48), (32, 96))
STEPS = 10
FLAT = 1.05
"""Doubling what is in flight gains less than this factor: it is flat."""
SECONDS = 0.3
"""Shortest run of one measurement."""


def fixed_and_rate(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Least-squares line through (tokens, seconds) of forward passes: seconds of a pass without tokens, and seconds a token.

    The fixed cost over the cost a token is the number of tokens at which a pass runs at half of the full rate. Errors are
    relative: a small pass counts as much as a large one.
    """
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    x = sum(w * tokens for w, (tokens, _) in zip(weights, points, strict=True)) / total
    y = sum(w * seconds for w, (_, seconds) in zip(weights, points, strict=True)) / total
    slope = sum(w * (tokens - x) * (seconds - y) for w, (tokens, seconds) in zip(weights, points, strict=True))
    slope /= sum(w * (tokens - x) ** 2 for w, (tokens, _) in zip(weights, points, strict=True))
    return y - slope * x, slope


def flat(rates: Sequence[float]) -> bool:
    """Whether the last two doublings gained little."""
    return len(rates) > 2 and rates[-1] < FLAT * rates[-2] and rates[-2] < FLAT * rates[-3]


def measure(bench: Bench, repeats: int, quick: bool) -> list[dict[str, Any]]:
    """A row for each size and number of samples in flight: samples/s of engine and pipeline, seconds of an engine's step."""
    rows = []
    for height, width in (SIZES[0],) if quick else SIZES:
        rates: list[float] = []
        n = 1
        while True:
            row = _row(bench, height, width, n, repeats, quick)
            rows.append(row)
            rates.append(row["engine"]["median"])
            if flat(rates) or n >= (4 if quick else 256):
                break
            n *= 2
    return rows


def _row(bench: Bench, height: int, width: int, n: int, repeats: int, quick: bool) -> dict[str, Any]:
    tokens = height * width // PATCH**2 + bench.text_tokens
    work = [Job(height, width, STEPS, 1, f'a sign that says "{100 + i}"', tokens, i) for i in range(n)]
    wide = bench.with_budget(max(bench.max_tokens, n * tokens))  # all of them in flight

    def rate(run: Any) -> dict[str, float]:
        started, done = time.perf_counter(), 0
        while done == 0 or (not quick and time.perf_counter() - started < SECONDS):
            run()
            wide.sync()
            done += n
        return {"samples_per_s": done / (time.perf_counter() - started)}

    found = interleaved({"engine": lambda: rate(lambda: wide.run_engine(work, False)), "pipeline": lambda: rate(lambda: wide.run_pipeline(work))}, repeats)
    engine, pipeline = (found[side]["samples_per_s"] for side in ("engine", "pipeline"))
    return {
        "size": f"{height}x{width}",
        "in_flight": n,
        "tokens": n * tokens,
        "engine": spread(engine),
        "pipeline": spread(pipeline),
        "engine / pipeline": spread([a / b for a, b in zip(engine, pipeline, strict=True)]),
        "step_s": spread([n / (rate * STEPS) for rate in engine]),
    }
