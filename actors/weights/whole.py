"""The weight store: the newest policy weights, by version, for every generator and evaluator.

A version's bytes are safetensors with a checksum. They are on disk before anyone can see the version, so a store that
is restarted (Ray runs its constructor again) serves what it served before. Older versions are kept for a few steps.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

KEEP = 4
"""Versions kept in memory, for evaluations that ask for one a few updates old."""


@dataclass(frozen=True)
class Weights:
    """One published version: safetensors bytes of the whole state dict and their SHA-256.

    `lineage` is the learner epoch that published it: after a return to a checkpoint the same version number means other
    weights.
    """

    version: int
    data: bytes
    sha256: str
    lineage: int = 0

    @property
    def name(self) -> tuple[int, int]:
        return self.lineage, self.version

    def state(self) -> dict[str, Tensor]:
        """State dict. Raises ValueError when the bytes are not what was published."""
        if hashlib.sha256(self.data).hexdigest() != self.sha256:
            raise ValueError(f"weights of version {self.version} are damaged: checksum differs")
        tensors: dict[str, Tensor] = load(self.data)
        return tensors

    @classmethod
    def of(cls, version: int, data: bytes, lineage: int = 0) -> Weights:
        return cls(version, data, hashlib.sha256(data).hexdigest(), lineage)


class VersionGone(LookupError):
    """A version that the store does not keep any more."""


def assemble(shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The whole state dict from the ranks' shards, in rank order: sharded tensors are cut along dimension 0; what only
    rank 0 sends (buffers) is whole."""
    return {name: torch.cat([s[name] for s in shards]) if all(name in s for s in shards) else tensor for name, tensor in shards[0].items()}


def _write(path: Path, data: bytes) -> None:
    """Whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_bytes(data)
    partial.rename(path)


class WeightStore:
    """Plain class; the driver makes it a Ray actor.

    Args:
        folder: where the newest version is kept, `weights-<lineage>-<version>.safetensors`.
    """

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._kept: OrderedDict[int, Weights] = OrderedDict()
        files = {tuple(map(int, f.stem.split("-")[1:])): f for f in self.folder.glob("weights-*-*.safetensors")}
        if files:
            lineage, version = newest = max(files)
            self._kept[version] = Weights.of(version, files[newest].read_bytes(), lineage)

    def publish_shard(self, version: int, epoch: int, rank: int, world: int, data: bytes) -> bool:
        """Take one rank's shard of a version (safetensors); True when this made the version complete and visible.

        `epoch` is the learner's: shards of different starts of the worker group are never mixed.
        """
        newest = self.version()
        if newest is not None and self._kept[newest].name == (epoch, version):
            return True  # asked again: the store died before it could answer
        _write(self.folder / f"shard-{epoch}-{version}-{rank}.safetensors", data)
        shards = [self.folder / f"shard-{epoch}-{version}-{r}.safetensors" for r in range(world)]
        if not all(s.exists() for s in shards):
            return False
        self.publish(Weights.of(version, save(assemble([load(s.read_bytes()) for s in shards])), epoch))
        for file in self.folder.glob("shard-*"):
            file.unlink()
        return True

    def publish(self, weights: Weights) -> None:
        """Make a version the newest. Publishing an older one drops the newer ones (a run that went back to a checkpoint)."""
        path = self.folder / f"weights-{weights.lineage}-{weights.version}.safetensors"
        _write(path, weights.data)
        for version in [v for v in self._kept if v >= weights.version]:
            del self._kept[version]
        self._kept[weights.version] = weights
        while len(self._kept) > KEEP:
            self._kept.popitem(last=False)
        for file in self.folder.glob("weights-*.safetensors"):
            if file != path:
                file.unlink()

    def version(self) -> int | None:
        """Newest version, None before the first."""
        return next(reversed(self._kept), None)

    def get(self, have: tuple[int, int] | None = None, exact: int | None = None) -> Weights | None:
        """The newest weights, or None if the caller already has them (`have` is their `name`) or there are none yet.

        With `exact`, that version and no other. Raises VersionGone when it is not kept.
        """
        if exact is not None:
            if exact not in self._kept:
                raise VersionGone(f"version {exact} is not kept any more; the store has {list(self._kept)}")
            return self._kept[exact]
        newest = self.version()
        return None if newest is None or self._kept[newest].name == have else self._kept[newest]


def pull(store: Any, have: tuple[int, int] | None, timeout_s: float, exact: int | None = None) -> Weights | None:
    """`WeightStore.get` on a Ray actor handle, with a deadline."""
    import ray

    answer: Weights | None = ray.get(store.get.remote(have, exact), timeout=timeout_s)
    return answer
