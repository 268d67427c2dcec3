"""How far the learner's log-probabilities lie from the sampler's, on the glyph policy: every kernel, precision, guidance.

    python -m benchmarks.logprob [--json] [--members 8] [--threads 1]

It is the start-up self-test (`trainer/learn/selftest.py`) with more rollouts and every stochastic step trained: rollouts of 16x48 and
16x24 packed into one batch of the engine, replayed in micro-batches of one size. Figures are |ratio - 1| with exact scaling,
mean and largest over all transitions, and the largest mean of a step. Without `--json` a markdown table is printed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from diffusion.kernel_names import CHURN, KERNEL_NAMES, stochastic_steps
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.learner import Learner
from trainer.learn.selftest import self_test

NOISE = {"flow_sde": 0.7, "constant_sde": 0.3, "cps": 0.5, "ddim_eta": 1.0, "edm_euler": 1.0, "edm_2ab": 1.0, "ancestral": 1.0}
POLICY = Path(__file__).resolve().parents[1] / "recipes" / "glyph-base"


def config_of(kernel: str, dtype: str, guidance: float) -> RunConfig:
    """Ten steps, or the public sampler's twenty and the clean-up for a churn kernel; all that draw noise are trained."""
    steps = 21 if kernel in CHURN else 10
    trained = list(range(stochastic_steps(kernel, steps)))
    sampler = {"kernel": kernel, "noise_level": NOISE[kernel], "steps": steps, "trained_steps": trained, "guidance": guidance}
    return parse_config({"model": {"path": str(POLICY), "dtype": dtype}, "sampler": sampler, "learner": {"ranks": 1}, "optimizer": {"ema": 0.0}})


def measure(kernel: str, dtype: str, guidance: float, members: int) -> dict[str, Any]:
    """One row of the table."""
    found = self_test(Learner(config_of(kernel, dtype, guidance), torch.device("cpu")), members)
    worst = max(found.by_step, key=lambda i: found.by_step[i])
    return {
        "kernel": kernel,
        "dtype": dtype,
        "guidance": guidance,
        "transitions": found.transitions,
        "mean": found.mean,
        "largest": found.largest,
        "worst_step": worst,
        "worst_step_mean": found.by_step[worst],
        "by_step": {str(i): v for i, v in found.by_step.items()},
    }


def markdown(rows: list[dict[str, Any]]) -> str:
    """Rows as a table."""
    lines = ["| kernel | precision | guidance | transitions | mean | largest | worst step, its mean |", "|---|---|---|---|---|---|---|"]
    for r in rows:
        figures = f"{r['mean']:.1e} | {r['largest']:.1e} | {r['worst_step']}, {r['worst_step_mean']:.1e}"
        lines.append(f"| `{r['kernel']}` | {r['dtype']} | {r['guidance']:g} | {r['transitions']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON, with the mean of every step")
    parser.add_argument("--members", type=int, default=8, help="rollouts of each size")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--kernels", nargs="+", choices=KERNEL_NAMES, default=list(KERNEL_NAMES), help="which kernels")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        cases = [(kernel, dtype, guidance) for dtype in ("float32", "bfloat16") for kernel in arguments.kernels for guidance in (1.0, 4.5)]
        rows = [measure(*case, arguments.members) for case in cases]
    finally:
        dist.destroy_process_group()
    print(json.dumps(rows, indent=2) if arguments.json else markdown(rows))


if __name__ == "__main__":
    main()
