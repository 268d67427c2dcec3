"""Groups of real gloo ranks, each a process of its own: `python -m MODULE RANK WORLD FOLDER`.

Everything that a rank needs lies in the folder: files, and a FileStore to meet at (no ports). What came of it is `out-RANK.pt`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

DEADLINE_S = 240.0
"""Of a collective."""
ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def alone() -> Iterator[None]:
    """A group of this process only, which is left whatever happens in it."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def launched(module: str, world: int, folder: Path, deadline_s: float = 2 * DEADLINE_S) -> list[Any]:
    """Run `module` as `world` ranks, each of which has `deadline_s`; what they returned."""
    logs = [(folder / f"log-{rank}").open("w") for rank in range(world)]
    command = [sys.executable, "-m", module]
    ranks = [subprocess.Popen([*command, str(rank), str(world), str(folder)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) for rank, log in enumerate(logs)]
    try:
        codes = [rank.wait(deadline_s) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        for log in logs:
            log.close()
    said = "\n".join((folder / f"log-{rank}").read_text()[-3000:] for rank in range(world))
    assert codes == [0] * world, said
    return [torch.load(folder / f"out-{rank}.pt", weights_only=False) for rank in range(world)]


def join(rank: int, world: int, folder: Path) -> None:
    """Make this process a rank, with one thread."""
    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=DEADLINE_S))


def leave(rank: int, folder: Path, out: Any) -> None:
    """Hand in what came of it and leave the group."""
    torch.save(out, folder / f"out-{rank}.pt")
    dist.destroy_process_group()
