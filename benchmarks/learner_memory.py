"""Memory of a learner rank while it starts: every rank reads its own part of the weights, or all of them before it shards.

    python -m benchmarks.learner_memory [--json | --markdown] [--quick] [--ranks 2]

A policy of SD3's architecture with 500 M parameters is written with random weights to a temporary folder (bf16, a file for every four
blocks). The ranks of a side are processes of their own that meet over gloo, one side after the other. Each says the most memory that was
resident (VmHWM: pages of the files that it reads are among it) while the learner was made, beyond what the process held before, with its
libraries loaded and the group ready. `--quick` checks that everything runs; it measures nothing.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.machine import machine
from benchmarks.markdown import table
from diffusion.allocator import keep_freed_memory
from diffusion.checkpoint import build_network, fill_network
from diffusion.config import ModelConfig
from diffusion.families.base import PackedModel
from diffusion.families.glyph.policy import write_skeleton
from trainer.config.load import parse_config
from trainer.learn.learner import Learner
from trainer.learn.parallel import mesh_of

ROOT = Path(__file__).resolve().parents[1]
TARGET = 1.15
"""Most that a start may take, as a multiple of the rank's masters, of its part of the optimiser's state, and one block."""
DEADLINE_S = 1800.0
BLOCKS_A_FILE = 4
CPU = torch.device("cpu")


class LoadsWhole(Learner):
    """The learner as it is without a sharded start."""

    def _filled(self, model: PackedModel) -> PackedModel:
        fill_network(model, self.config.model, self.device, self.config.seed)
        self._spread(model)
        return model


SIDES = {"own part": Learner, "whole": LoadsWhole}


def write_policy(folder: Path, layers: int, heads: int) -> None:
    """A policy folder with random weights in shards; heads are 64 wide."""
    write_skeleton(folder)
    file = folder / "transformer" / "config.json"
    sizes = {"num_layers": layers, "num_attention_heads": heads, "attention_head_dim": 64, "caption_projection_dim": 64 * heads}
    file.write_text(json.dumps(json.loads(file.read_text()) | sizes))
    parts: dict[int, dict[str, Tensor]] = {}
    for name, tensor in build_network(ModelConfig(path=str(folder)))[0].state_dict().items():
        block = int(name.split(".")[1]) if name.startswith("transformer_blocks.") else 0
        parts.setdefault(block // BLOCKS_A_FILE, {})[name] = tensor
    weight_map, generator = {}, torch.Generator().manual_seed(0)
    for number, part in sorted(parts.items()):
        shard = f"diffusion_pytorch_model-{number + 1:05d}-of-{len(parts):05d}.safetensors"
        save_file({n: torch.randn(t.shape, generator=generator).mul_(0.02).bfloat16() for n, t in part.items()}, file.parent / shard)
        weight_map |= dict.fromkeys(part, shard)
    (file.parent / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    return next(int(line.split()[1]) << 10 for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))


def rank_main(side: str, rank: int, world: int, folder: Path) -> None:
    """One rank: makes a learner and prints what that took."""
    torch.set_num_threads(1)
    keep_freed_memory()
    store = dist.FileStore(str(folder / f"store-{side}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=DEADLINE_S))
    config = parse_config(
        {
            "model": {"path": str(folder / "policy")},
            "rollout": {"groups_per_step": max(2, world)},
            "learner": {"ranks": world},
            "optimizer": {"ema": 0.0},
        }
    )
    mesh_of(CPU, config.learner)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again
    learner = SIDES[side](config, CPU)
    found = {"peak": status("VmHWM") - before}
    gc.collect()
    found["held"] = status("VmRSS") - before
    found["masters"] = sum(p.to_local().nbytes for p in learner.model.parameters())  # type: ignore[attr-defined]
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(found))


def measured(side: str, world: int, folder: Path) -> list[dict[str, int]]:
    """What the ranks of a side say. Raises RuntimeError with the output of one that fails."""
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.learner_memory", "--folder", str(folder), "--side", side, "--ranks", str(world), "--rank"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [subprocess.Popen([*command, str(r)], cwd=ROOT, env=environment, **pipes) for r in range(world)]
    try:
        said = [rank.communicate(timeout=DEADLINE_S) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, said, strict=True):
        if rank.returncode != 0:
            raise RuntimeError(f"a rank of {side!r} failed:\n{errors[-3000:]}")
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def measure(world: int, quick: bool) -> dict[str, Any]:
    """Both sides, and what a start is held against."""
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-") as name:
        folder = Path(name)
        write_policy(folder / "policy", *((2, 4) if quick else (13, 16)))
        network = build_network(ModelConfig(path=str(folder / "policy")))[0]
        sides = {side: measured(side, world, folder) for side in SIDES}
    largest = 4 * max(sum(p.numel() for p in block.parameters()) for block in network.blocks)
    masters = max(rank["masters"] for rank in sides["own part"])
    peaks = {side: max(rank["peak"] for rank in ranks) for side, ranks in sides.items()}
    allowed = masters + 2 * masters + largest
    return {
        "machine": machine(),
        "quick": quick,
        "ranks": world,
        "parameters": sum(p.numel() for p in network.parameters()),
        "masters": masters,
        "optimiser": 2 * masters,
        "largest_block": largest,
        "sides": sides,
        "peaks": peaks,
        "of_masters_optimiser_and_block": {side: peak / allowed for side, peak in peaks.items()},
        "of_masters_and_block": {side: peak / (masters + largest) for side, peak in peaks.items()},
        "target": TARGET,
    }


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    names = {"own part": "each rank reads its own part", "whole": "each rank reads all, then shards"}
    rows = []
    for side, ranks in found["sides"].items():
        held = max(rank["held"] for rank in ranks)
        shares = (found[key][side] for key in ("of_masters_optimiser_and_block", "of_masters_and_block"))
        rows.append([names[side], f"{found['peaks'][side] / 1e6:.0f}", f"{held / 1e6:.0f}", *(f"{share:.2f}" for share in shares)])
    head = ["start, MB a rank", "peak", "held then", "peak / (masters + optimiser + block)", "peak / (masters + block)"]
    sizes = f"masters {found['masters'] / 1e6:.0f} MB, optimiser {found['optimiser'] / 1e6:.0f} MB, largest block {found['largest_block'] / 1e6:.0f} MB"
    return f"{found['parameters'] / 1e6:.0f} M parameters over {found['ranks']} ranks. Of a rank: {sizes}.\n\n{table(head, rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--markdown", action="store_true", help="print a Markdown table (the default)")
    parser.add_argument("--quick", action="store_true", help="a tiny policy: does everything run?")
    parser.add_argument("--ranks", type=int, default=2, help="learner ranks")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        rank_main(options.side, options.rank, options.ranks, options.folder)
        return
    found = measure(options.ranks, options.quick)
    print(json.dumps(found, indent=1) if options.json else markdown(found))


if __name__ == "__main__":
    main()
