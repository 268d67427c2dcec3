"""One rank of a mesh that runs scenarios of `ranks.py` for `test_mesh.py`: `python -m tests.unit.trainer.learn.mesh_ranks RANK WORLD FOLDER`.

Meshes of as many ranks as there are, one after the other.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.gloo import join, leave
from tests.unit.trainer.learn.given import SCENARIOS as GIVEN
from tests.unit.trainer.learn.ranks import CPU, SAVED, SCENARIOS, resumed, scenario
from trainer.learn.learner import Learner
from trainer.learn.selftest import self_test

MESHES: dict[str, dict[str, int]] = {
    "two sequence ranks": {"ranks": 2, "sequence_ranks": 2},
    "two sequence ranks in four shards": {"ranks": 4, "sequence_ranks": 2},
    "two replicas of two shards": {"ranks": 4, "replicas": 2},
    "two replicas of two sequence ranks": {"ranks": 4, "replicas": 2, "sequence_ranks": 2},
}
QUICK = ("plain", "lora")
"""Scenarios of two ranks;"""
LONG = (
    *QUICK,
    "two steps in sigma space",
    "token budget",
    "clipped gradient in one unit",
    "recomputed",
    "sharded gradients",
    "kl",
    "moments in 8 bits",
    "finished rollouts",
    "clips",
    *GIVEN,
)
"""of four."""


def names_of(world: int) -> tuple[str, ...]:
    return QUICK if world == 2 else LONG


def self_tested(folder: Path, mesh: dict[str, int] | None = None) -> dict[str, Any]:
    """What the self-test finds before the first update."""
    found = asdict(self_test(Learner(SCENARIOS["plain"].config(folder, mesh), CPU)))
    return {name: value for name, value in found.items() if name != "seconds"}


def main(rank: int, world: int, folder: Path) -> None:
    join(rank, world, folder)
    out: dict[str, dict[str, Any]] = {}
    for label, mesh in MESHES.items():
        if mesh["ranks"] == world:
            found = {name: scenario(name, folder, rank, world, mesh, label) for name in names_of(world)}
            found |= {f"{name}, resumed": resumed(name, folder, 1, mesh) for name in SAVED if name in names_of(world)}
            out[label] = found | {"self-test": self_tested(folder, mesh)}
    leave(rank, folder, out)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
