"""Peak memory of one side at one workload, in a process of its own:

    python -m benchmarks.sampling.memory SIDE WORKLOAD DEVICE THREADS [quick]

prints JSON: on the CPU the peak of the resident set, and of it what came after the policy was loaded; on a GPU the peak of
torch's allocator.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.sampling.sides import Bench
from benchmarks.sampling.workload import jobs, spec

SIDES: dict[str, Callable[[Bench, Any], object]] = {
    "limit": lambda bench, work: bench.run_limit(bench.record(work)),
    "engine": lambda bench, work: bench.run_engine(work, rollout=False),
    "engine, rollout": lambda bench, work: bench.run_engine(work, rollout=True),
    "pipeline": lambda bench, work: bench.run_pipeline(work),
    "loop": lambda bench, work: bench.run_loop(work),
}
DEADLINE_S = 600.0


def measure(side: str, workload: str, device: str, threads: int, quick: bool) -> dict[str, float]:
    """Peaks in MB, taken in a fresh process. Raises subprocess.CalledProcessError, subprocess.TimeoutExpired."""
    arguments = [sys.executable, "-m", "benchmarks.sampling.memory", side, workload, device, str(threads), *(["quick"] if quick else [])]
    done = subprocess.run(arguments, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=DEADLINE_S, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def _status_mb(name: str) -> float:
    """A line of this process's memory: VmRSS, or VmHWM, its peak (getrusage's would be inherited from the parent)."""
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith(name)).split()[1]) / 1024


def main() -> None:
    side, workload, device, threads, *quick = sys.argv[1:]
    torch.set_num_threads(int(threads))
    bench = Bench(device, spec()["max_tokens"][device], spec()["noise_level"], rivals=side in ("pipeline", "loop"))
    work = jobs(workload, bench.text_tokens, bool(quick))
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 2**20
        SIDES[side](bench, work)
        peak = torch.cuda.max_memory_allocated() / 2**20
    else:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak of loading
        before = _status_mb("VmRSS")
        SIDES[side](bench, work)
        peak = _status_mb("VmHWM")
    print(json.dumps({"peak_mb": peak, "above_loaded_mb": peak - before}))


if __name__ == "__main__":
    main()
