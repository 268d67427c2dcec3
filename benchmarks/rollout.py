"""Sampling: our engine against the bare forward pass, a diffusers pipeline and the loop of the Flow-GRPO family.

    python benchmarks/rollout.py [--quick] [--json | --markdown] [--device cuda] [--threads N] [--only uniform,mixed,…]

(a) the bare packed forward passes that the engine makes, in a loop: no noise, no kernel, no scheduler; (b) the engine;
(c) `StableDiffusion3Pipeline` with prompt_embeds and output_type="latent", a call for each (size, steps) with the largest
batch that the same token budget holds; (d) diffusers' transformer in a loop over time steps for one prompt's group at a
time, with SDE steps and log-densities.

One process, the weights of recipes/glyph-base, the workloads of workloads/rollout.json, equal threads. Sides take turns,
another one first in each repeat; figures are medians with their range, ratios are taken within a repeat. Before anything is
timed, (b) and (c) without noise, and (b) and (d) with the same noise, must draw the same samples within 1e-3. The process
keeps freed memory, as ddrl's own do (`keep_freed_memory`), which all sides gain by. `--quick` is a check that everything
runs, not a measurement.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parents[1]
if sys.path[0] == str(ROOT / "benchmarks"):  # run as a script
    sys.path[0] = str(ROOT)

if TYPE_CHECKING:
    from benchmarks.sampling.sides import Bench
    from benchmarks.sampling.workload import Job

SECTIONS = ("uniform", "mixed", "mixed_groups", "small", "streaming", "growth", "memory")
REPEATS, QUICK_REPEATS = 5, 2
MEMORY_OF = ("uniform", "mixed")


def timed(bench: Bench, work: list[Job], run: Callable[[], object]) -> dict[str, float]:
    """One run of a side over all of `work`."""
    samples, tokens = sum(job.n for job in work), sum(job.work for job in work)
    bench.sync()
    started, used = time.perf_counter(), time.process_time()
    run()
    bench.sync()
    seconds, used = time.perf_counter() - started, time.process_time() - used
    return {"samples_per_s": samples / seconds, "ktokens_per_s": tokens / seconds / 1000, "samples_per_cpu_s": samples / used}


def ratio(found: dict[str, dict[str, list[float]]], one: str, two: str, name: str = "samples_per_s") -> dict[str, Any]:
    """Spread of `one`/`two` within the repeats."""
    from benchmarks.stats import spread

    return spread([a / b for a, b in zip(found[one][name], found[two][name], strict=True)])


def offline(bench: Bench, name: str, repeats: int, quick: bool) -> dict[str, Any]:
    """Every side on a workload whose requests are all there from the start."""
    from benchmarks.sampling.tables import RATIOS
    from benchmarks.sampling.workload import Batch, batches, jobs, tokens_per_forward
    from benchmarks.stats import interleaved, spread

    work = jobs(name, bench.text_tokens, quick)
    check = bench.check(work)
    calls = bench.record(work)
    sides: dict[str, Callable[[], object]] = {
        "limit": lambda: bench.run_limit(calls),
        "engine": lambda: bench.run_engine(work, rollout=False),
        "engine, rollout": lambda: bench.run_engine(work, rollout=True),
        "pipeline": lambda: bench.run_pipeline(work),
        "loop": lambda: bench.run_loop(work),
    }
    found = interleaved({side: (lambda run=run: timed(bench, work, run)) for side, run in sides.items()}, repeats)  # type: ignore[misc]
    alone = [Batch(job.kind, ((i, job.n),)) for i, job in enumerate(work)]
    ours = sum(job.work for job in work) / len(calls)
    tokens = dict.fromkeys(sides, ours) | {
        "pipeline": tokens_per_forward(work, batches(work, bench.max_tokens)),
        "loop": tokens_per_forward(work, alone),
    }
    return {
        "samples": sum(job.n for job in work),
        "kinds": len({job.kind for job in work}),
        "check": check,
        "sides": {side: {name: spread(values) for name, values in figures.items()} for side, figures in found.items()},
        "filled": {side: {"tokens": t, "share": t / bench.max_tokens} for side, t in tokens.items()},
        "ratios": {f"{one} / {two}": ratio(found, one, two) for one, two in RATIOS},
        "cpu_ratios": {f"{one} / {two}": ratio(found, one, two, "samples_per_cpu_s") for one, two in RATIOS},
    }


def streaming(bench: Bench, repeats: int, quick: bool, share: float) -> dict[str, Any]:
    """Requests that arrive while others are sampled."""
    from benchmarks.sampling.stream import BatchServer, EngineServer, serve
    from benchmarks.sampling.workload import arrivals, jobs
    from benchmarks.stats import interleaved, percentile, spread

    work = jobs("streaming", bench.text_tokens, quick)
    samples = sum(job.n for job in work)
    capacity = [timed(bench, work, lambda: bench.run_engine(work, rollout=False))["samples_per_s"] for _ in range(repeats + 1)][1:]
    times = arrivals(len(work), share * statistics.median(capacity) * len(work) / samples)
    servers: dict[str, Callable[[], Any]] = {
        "engine": lambda: EngineServer(bench, work),
        "pipeline": lambda: BatchServer(bench, work, lambda batch: bench.run_batch(work, batch), join=True),
        "loop": lambda: BatchServer(bench, work, lambda batch: bench.run_group(work[batch.parts[0][0]]), join=False),
    }

    def once(make: Callable[[], Any]) -> dict[str, float]:
        latencies, seconds = serve(times, make())
        return {"samples_per_s": samples / seconds, "p50_s": percentile(latencies, 0.5), "p99_s": percentile(latencies, 0.99)}

    found = interleaved({side: (lambda make=make: once(make)) for side, make in servers.items()}, repeats)  # type: ignore[misc]
    ratios = {f"samples/s, engine / {rival}": ratio(found, "engine", rival) for rival in ("pipeline", "loop")}
    ratios |= {f"{q}, {rival} / engine": ratio(found, rival, "engine", f"{q}_s") for rival in ("pipeline", "loop") for q in ("p50", "p99")}
    return {
        "requests": len(work),
        "share": share,
        "capacity": spread(capacity),
        "sides": {side: {name: spread(values) for name, values in figures.items()} for side, figures in found.items()},
        "ratios": ratios,
    }


def measure(options: argparse.Namespace, sections: list[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Every one of `sections`."""
    import diffusers
    import torch

    from benchmarks.machine import machine
    from benchmarks.sampling import growth, memory
    from benchmarks.sampling.sides import Bench
    from benchmarks.sampling.workload import names, spec
    from diffusion.allocator import keep_freed_memory

    device, quick = options.device, options.quick
    repeats = options.repeats or (QUICK_REPEATS if quick else REPEATS)
    torch.set_num_threads(options.threads)
    here = machine() | {"threads": options.threads, "device": torch.cuda.get_device_name() if device == "cuda" else "the CPU"}
    here |= {"torch": torch.__version__, "diffusers": diffusers.__version__}
    keep_freed_memory()
    bench = Bench(device, spec()["max_tokens"][device], spec()["noise_level"])
    loads: list[float] = []
    result: dict[str, Any] = {"machine": here, "quick": quick, "repeats": repeats, "max_tokens": bench.max_tokens, "load_before_each_section": loads}
    result["workloads"] = {}
    for name in sections:
        say(f"{name} …")
        loads.append(os.getloadavg()[0])
        if name in names():
            result["workloads"][name] = offline(bench, name, repeats, quick)
        elif name == "streaming":
            result[name] = streaming(bench, repeats, quick, spec()["share"] if options.share is None else options.share)
        elif name == "growth":
            result[name] = growth.measure(bench, repeats, quick)
        else:
            sides, of = (("engine", "pipeline"), MEMORY_OF[:1]) if quick else (tuple(memory.SIDES), MEMORY_OF)
            result[name] = {workload: {side: memory.measure(side, workload, device, options.threads, quick) for side in sides} for workload in of}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few and small requests, two repeats: does everything run?")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables (the default)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="torch threads of every side [default: 1, as a rollout generator has]")
    parser.add_argument("--repeats", type=int, help=f"[default: {REPEATS}, or {QUICK_REPEATS} with --quick]")
    parser.add_argument("--share", type=float, help="arrivals over the engine's capacity [default: the workload's]")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {', '.join(SECTIONS)}")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    unknown = set(chosen) - set(SECTIONS)
    if unknown or (options.json and options.markdown):
        parser.error(f"unknown: {', '.join(sorted(unknown))}" if unknown else "choose one of --json and --markdown")
    logging.getLogger("xformers").setLevel(logging.ERROR)
    from benchmarks.sampling.tables import markdown

    result = measure(options, chosen, lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps(result, indent=1) if options.json else markdown(result))


if __name__ == "__main__":
    main()
