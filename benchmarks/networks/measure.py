"""Timing of one workload: every side takes its turn in every repeat."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.networks.workloads import Batch, Networks, Workload


@dataclass(frozen=True)
class Plan:
    """How long to measure. `seconds`: least time of one timing; shorter forwards are repeated within it."""

    device: torch.device
    dtype: torch.dtype
    repeats: int
    seconds: float


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(run: Callable[[], object], loops: int, device: torch.device) -> float:
    """Seconds of one of `loops` runs."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(loops):
        run()
    synchronize(device)
    return (time.perf_counter() - start) / loops


def spread_of(values: list[float]) -> dict[str, float]:
    return {"median": median(values), "low": min(values), "high": max(values)}


def matmul_rate(plan: Plan) -> Callable[[], float]:
    """A function that measures the operations per second of one large square product."""
    edge = 8192 if plan.device.type == "cuda" else 512
    a, b = (torch.randn(edge, edge, device=plan.device).to(plan.dtype) for _ in range(2))
    timed(lambda: a @ b, 2, plan.device)
    return lambda: 2 * edge**3 / timed(lambda: a @ b, 10, plan.device)


def relative_error(found: list[Tensor], expected: list[Tensor]) -> float:
    """Root mean square of the difference over that of `expected`."""
    difference = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True))
    return (difference / sum(float(b.float().square().sum()) for b in expected)) ** 0.5


def measure_batch(workload: Workload, networks: Networks, size: int, plan: Plan, providers: list[str], rate: Callable[[], float]) -> dict[str, Any]:
    """All sides at one batch size. A side that runs out of memory is reported as such."""
    batch = Batch.of(workload, size, plan.device, plan.dtype)

    def ours(compiled: bool, provider: str) -> Callable[[], list[Tensor]]:
        model = networks.compiled if compiled else networks.eager

        def run() -> list[Tensor]:
            model.provider, model.buckets = provider, 8 if compiled and not batch.even else None
            return batch.ours(model)

        return run

    sides: dict[str, Callable[[], list[Tensor]]] = {"diffusers eager": lambda: batch.diffusers(networks.diffusers)}
    for provider in providers:
        sides |= {f"{provider} eager": ours(False, provider), f"{provider} compiled": ours(True, provider)}

    rows: dict[str, dict[str, Any]] = {}
    loops: dict[str, int] = {}
    expected: list[Tensor] = []
    for name, run in sides.items():
        row: dict[str, Any] = {"side": name}
        rows[name] = row
        try:
            start = time.perf_counter()
            out = run()
            synchronize(plan.device)
            row["first_call_s"] = time.perf_counter() - start
            if plan.device.type == "cuda":
                del out
                torch.cuda.reset_peak_memory_stats(plan.device)
                before = torch.cuda.memory_allocated(plan.device)
                out = run()
                row["peak_bytes"] = torch.cuda.max_memory_allocated(plan.device)
                row["peak_above_weights_bytes"] = row["peak_bytes"] - before
            expected = expected or out
            row["relative_error"] = relative_error(out, expected)
            del out
            loops[name] = max(1, int(plan.seconds / timed(run, 1, plan.device)))
        except torch.OutOfMemoryError:
            row["failed"] = "out of memory"
            torch.cuda.empty_cache()

    times: dict[str, list[float]] = {name: [] for name in loops}
    rates: list[float] = []
    for _ in range(plan.repeats):
        rates.append(rate())
        for name, count in loops.items():
            times[name].append(timed(sides[name], count, plan.device))

    tokens = sum(networks.eager.packed_tokens(shape, workload.prompt) for shape in workload.shapes_of(size))
    flops = sum(networks.eager.forward_flops(shape, workload.prompt) for shape in workload.shapes_of(size))
    for name, seconds in times.items():
        rows[name]["seconds"] = spread_of(seconds)
        rows[name]["samples_per_s"] = spread_of([size / s for s in seconds])
        rows[name]["tokens_per_s"] = spread_of([tokens / s for s in seconds])
        rows[name]["utilisation"] = spread_of([flops / s / r for s, r in zip(seconds, rates, strict=True)])
        if "diffusers eager" in times:  # neighbours in time
            rows[name]["ratio_to_diffusers"] = spread_of([b / s for s, b in zip(seconds, times["diffusers eager"], strict=True)])
    return {"batch": size, "tokens": tokens, "flops": flops, "matmul_flops_per_s": spread_of(rates), "sides": list(rows.values())}


@torch.no_grad()
def measure(workload: Workload, plan: Plan, providers: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """A workload over its batch sizes, and the best of each side over all of them."""
    networks = Networks(workload.config, plan.device, plan.dtype)
    rate = matmul_rate(plan)
    found = []
    for size in workload.batches:
        say(f"{workload.name}, batch {size} …")
        found.append(measure_batch(workload, networks, size, plan, providers, rate))
    best: dict[str, dict[str, Any]] = {}
    for batch in found:
        for row in batch["sides"]:
            if "failed" not in row and row["samples_per_s"]["median"] > best.get(row["side"], {}).get("samples_per_s", 0):
                best[row["side"]] = {
                    "batch": batch["batch"],
                    "samples_per_s": row["samples_per_s"]["median"],
                    "utilisation": row["utilisation"]["median"],
                }
    base = best.get("diffusers eager", {}).get("samples_per_s")
    for row in best.values():
        row["ratio_to_diffusers"] = row["samples_per_s"] / base if base else None
    parameters = sum(p.numel() for p in networks.eager.parameters())
    return {"workload": workload.name, "parameters": parameters, "prompt_tokens": workload.prompt, "batches": found, "best": best}
