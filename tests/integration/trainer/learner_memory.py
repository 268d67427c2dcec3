"""Resident memory of one learner rank, in a process of its own: `python -m tests.integration.trainer.learner_memory RECIPE.json RANK FOLDER`.

The recipe's policy has random weights (`model.init`); its ranks meet in FOLDER. What is printed, as JSON in bytes beyond what the imports
take: `built`, what the learner holds before its first update; `held`, what it holds after two; `update`, the most during the second. And
`checkpoint`, the bytes of one on disk, of all ranks.
"""

from __future__ import annotations

import gc
import json
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.config.load import parse_config
from trainer.learn.batch import StepBatch
from trainer.learn.checkpoint import save_shards
from trainer.learn.learner import Learner
from trainer.learn.objective import Anchors, Transitions

CPU = torch.device("cpu")


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def resident() -> int:
    gc.collect()
    return status("VmRSS")


def transitions(learner: Learner, rows: int) -> Transitions:
    sampler = learner.config.sampler
    steps = torch.arange(rows) % (sampler.steps - 1)
    grid = learner.kernel.time_grid(sampler.steps)
    x = torch.randn(rows, *learner.shape)
    return Transitions(
        x=x,
        x_next=x + 0.1 * torch.randn_like(x),
        t=grid[steps],
        t_next=grid[steps + 1],
        step=steps,
        old_log_prob=torch.zeros(rows, dtype=torch.float64),
        advantage=torch.randn(rows),
        weight=torch.ones(rows),
        text=torch.zeros(rows, dtype=torch.int64),
    )


def anchors(learner: Learner, rows: int) -> Anchors:
    x0, eps = torch.randn(rows, *learner.shape), torch.randn(rows, *learner.shape)
    return Anchors(x0, eps, torch.rand(rows), torch.ones(rows), torch.zeros(rows, dtype=torch.int64))


def main(recipe: Path, rank: int, folder: Path) -> None:
    config = parse_config(json.loads(recipe.read_text()))
    world = config.learner.ranks
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), world), rank=rank, world_size=world, timeout=timedelta(seconds=600))
    warm = torch.nn.Linear(8, 8)  # what autograd and the optimiser take once
    warm(torch.zeros(1, 8)).sum().backward()
    start = resident()
    learner = Learner(config, CPU)
    found = {"built": resident() - start}
    assert learner.probe is not None
    rows = config.learner.micro_batch  # a pass of each kind
    batch = StepBatch(learner.probe.expand(1), transitions(learner, rows), anchors(learner, rows), rows * world, rows * world, [rows] * world, [rows] * world)
    for step in (1, 2):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
        stats = learner.update([batch], step)
        assert stats["skipped"] == 0, stats
    found["update"] = status("VmHWM") - start
    found["held"] = resident() - start
    save_shards(learner.shards(), folder / "checkpoint")
    dist.barrier()
    found["checkpoint"] = sum(f.stat().st_size for f in (folder / "checkpoint").rglob("*") if f.is_file())
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
