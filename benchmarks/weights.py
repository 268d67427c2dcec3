"""Publishing weights against a bare copy of the same bytes: two rank processes, two generator processes, one machine, one run.

    python -m benchmarks.weights [--json] [--megabytes 1000] [--repeats 5] [--quick]

Ours: each rank hands in its half (digest, parts, table), each generator pulls the version, checks every digest and puts it in place.
Bare: each rank copies its half into a block of shared memory that is there already, each generator copies the whole block into its
tensors. Sides take turns; a ratio is bare seconds over ours, within a repeat. One thread a process. Without `--json` a markdown table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Mapping
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.markdown import figure, table
from benchmarks.stats import interleaved, spread

ROOT = str(Path(__file__).resolve().parents[1])
WORLD = 2
TENSOR = (4096, 1536)
"""Shape of a tensor of the state: 25 MB."""
DEADLINE_S = 300.0


def block_of(name: str) -> shared_memory.SharedMemory:
    block = shared_memory.SharedMemory(name)
    resource_tracker.unregister(block._name, "shared_memory")  # type: ignore[attr-defined]  # its maker removes it
    return block


class Rank:
    """Half of every tensor."""

    def __init__(self, rank: int, tensors: int, block: str) -> None:
        import torch

        torch.set_num_threads(1)
        rows = TENSOR[0] // WORLD
        self.rank, self.rows, self.block = rank, rows, block_of(block)
        self.state = {f"blocks.{i}.weight": torch.randn(rows, TENSOR[1]) for i in range(tensors)}

    def hand_in(self, store: Any, transport: Any, version: int) -> None:
        import ray

        from actors.weights.shards import write_slices

        slices = ((name, TENSOR, (self.rank * self.rows, 0), tensor) for name, tensor in self.state.items())
        ray.get(store.hand_in.remote(*write_slices(transport, slices, (1, version), self.rank, WORLD)), timeout=DEADLINE_S)

    def copy(self) -> None:
        import torch

        shared = torch.frombuffer(self.block.buf, dtype=torch.float32).view(len(self.state), *TENSOR)
        for i, tensor in enumerate(self.state.values()):
            shared[i, self.rank * self.rows : (self.rank + 1) * self.rows].copy_(tensor)


class Generator:
    """The whole state, in place."""

    def __init__(self, tensors: int, block: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.block = block_of(block)
        self.state = {f"blocks.{i}.weight": torch.zeros(TENSOR) for i in range(tensors)}

    def load(self, store: Any) -> None:
        from actors.weights.reading import pull

        view = pull(store, None, DEADLINE_S)
        assert view is not None
        for name, place, piece in view.open(DEADLINE_S).pieces():
            self.state[name][place].copy_(piece)

    def copy(self) -> None:
        import torch

        shared = torch.frombuffer(self.block.buf, dtype=torch.float32).view(len(self.state), *TENSOR)
        for tensor, whole in zip(self.state.values(), shared, strict=True):
            tensor.copy_(whole)


def measure(megabytes: int, repeats: int, folder: Path) -> dict[str, Any]:
    """Seconds of each side, and their ratios to the bare copy."""
    import ray

    from actors.weights.store import WeightStore
    from actors.weights.transport import FolderTransport, ObjectTransport

    size = 4 * TENSOR[0] * TENSOR[1]
    tensors = max(1, round(megabytes * 1_000_000 / size))
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False, configure_logging=False, object_store_memory=2 * tensors * size + (200 << 20))
    block = shared_memory.SharedMemory(create=True, size=tensors * size)
    transports = {
        "objects": ObjectTransport(),
        "folder": FolderTransport(str(folder)),
        "folder in memory": FolderTransport(f"/dev/shm/ddrl-weights-{os.getpid()}"),
    }
    try:
        ranks: list[Any] = [ray.remote(Rank).remote(rank, tensors, block.name) for rank in range(WORLD)]
        generators: list[Any] = [ray.remote(Generator).remote(tensors, block.name) for _ in range(2)]
        stores: dict[str, Any] = {name: ray.remote(WeightStore).options(num_cpus=0.1).remote(transport) for name, transport in transports.items()}
        versions = dict.fromkeys(transports, 0)

        def both(first: list[Any], then: Any) -> Mapping[str, float]:
            began = time.perf_counter()
            ray.get(first, timeout=DEADLINE_S)
            written = time.perf_counter()
            ray.get(then(), timeout=DEADLINE_S)
            return {"up": written - began, "down": time.perf_counter() - written, "both": time.perf_counter() - began}

        def publish(name: str) -> Mapping[str, float]:
            versions[name] += 1
            store = stores[name]
            found = both([r.hand_in.remote(store, transports[name], versions[name]) for r in ranks], lambda: [g.load.remote(store) for g in generators])
            ray.get(store.lost.remote((1, versions[name]), "measured"), timeout=DEADLINE_S)  # its memory is free for the next side
            return found

        def bare() -> Mapping[str, float]:
            return both([r.copy.remote() for r in ranks], lambda: [g.copy.remote() for g in generators])

        seconds = interleaved({"bare copy": bare} | {name: (lambda n=name: publish(n)) for name in transports}, repeats)  # type: ignore[misc]
    finally:
        ray.shutdown()
        block.close()
        block.unlink()
        for transport in transports.values():
            if isinstance(transport, FolderTransport):
                transport.clear()
    base = seconds["bare copy"]
    rows = [
        {"side": side, **{what: spread(values) for what, values in found.items()}}
        | {f"ratio {what}": spread([b / s for b, s in zip(base[what], values, strict=True)]) for what, values in found.items()}
        for side, found in seconds.items()
    ]
    return {"megabytes": tensors * size / 1e6, "ranks": WORLD, "generators": 2, "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    head = ["", "ranks hand in, s", "generators load, s", "together, s", "bare / this"]
    rows = [[r["side"], *(figure(r[what], 2) for what in ("up", "down", "both")), figure(r["ratio both"], 2)] for r in found["rows"]]
    return f"{found['megabytes']:.0f} MB from {found['ranks']} ranks to {found['generators']} generators.\n\n" + table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Publishing weights against a bare copy of the same bytes.")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="50 MB, twice: only that it runs")
    given = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))
    sys.path.insert(0, ROOT)
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(50 if given.quick else given.megabytes, 2 if given.quick else given.repeats, Path(folder))
    if given.json:
        print(json.dumps({"machine": about, **found}))
    else:
        print(f"{about['cores']} cores ({about['processor']}), load average {about['load_at_start']} before, Python {about['python']}. {markdown(found)}")


if __name__ == "__main__":
    main()
