"""How the bytes of a version travel: one small class per way. Importing this brings neither torch nor Ray.

    rank    write(part) ─► where it lies           store   remember(shard) / recall() / forget(version)           reader   read(parts) ─► tensors

A part is a few tensors of one rank, so that neither end holds more than one part beside its model. The store keeps no bytes: with
`FolderTransport` files outlive the ranks, the store and the run, and a store that is started again finds every table. With
`ObjectTransport` bytes are Ray objects of the rank that put them: they end with it, and a reader has them or is told so.

Another way (NCCL, say) is another class with these methods.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from abc import ABC, abstractmethod
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.weights.table import Entry, Name, Shard, TableError, parts_of

if TYPE_CHECKING:
    from torch import Tensor

RELEASED = "released"
"""File beside a version that no evaluation waits for any more."""
Objects = dict[str, Any]
"""Ray object references by the part they hold."""
Tensors = dict[tuple[str, str], "Tensor"]
"""Tensors by part and name."""


class WeightsGone(LookupError):
    """Bytes of a version that are not there any more: the rank that held them has died, or they were freed."""


class WeightsDamaged(ValueError):
    """Bytes of a version that are not what was handed in."""


class Transport(ABC):
    """One way. Instances are settings: they pickle, and every process has its own."""

    @abstractmethod
    def write(self, name: Name, part: str, tensors: Mapping[str, Tensor]) -> tuple[str, Objects]:
        """Put CPU tensors where readers find them; returns where, and references that go with the table. Writing a part again replaces it."""

    @abstractmethod
    def read(self, entries: list[Entry], objects: Objects, deadline_s: float) -> Tensors:
        """The tensors of `entries`, as shared or mapped memory: they stay readable while they are held, whatever the store frees.

        Raises:
            WeightsGone: a part is not there, or has not come within `deadline_s`.
            WeightsDamaged: a part is no such tensors. Digests are the caller's business.
        """

    def remember(self, shard: Shard) -> None:  # noqa: B027  # nothing to do where bytes do not outlive a store
        """Keep a shard's table with its bytes."""

    def recall(self) -> list[Shard]:
        """Shards that can still be read by a store that is started again, in the order of their versions."""
        return []

    def forget(self, name: Name) -> None:  # noqa: B027
        """Free what lies there of a version."""

    def sweep(self, newest: Name, kept: Container[Name]) -> None:  # noqa: B027
        """Free what lies there of versions before `newest` that are not `kept`: also of those that no store ever knew of."""

    def release(self, name: Name) -> None:  # noqa: B027
        """No evaluation waits for a version any more."""


@dataclass(frozen=True)
class FolderTransport(Transport):
    """Safetensors files in a folder that every node sees: `<path>/<lineage>-<version>/rank-0-000.safetensors`, and `rank-0.json` beside
    them once the store knows of them. A file is whole or not there."""

    path: str

    def _folder(self, name: Name) -> Path:
        return Path(self.path) / f"{name[0]}-{name[1]}"

    def write(self, name: Name, part: str, tensors: Mapping[str, Tensor]) -> tuple[str, Objects]:
        from safetensors.torch import save_file

        path = self._folder(name) / f"{part}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(dict(tensors), partial)
        partial.rename(path)
        return str(path.relative_to(self.path)), {}

    def read(self, entries: list[Entry], objects: Objects, deadline_s: float) -> Tensors:
        from safetensors import safe_open

        found: Tensors = {}
        for where, own in parts_of(entries).items():
            path = Path(self.path) / where
            try:
                with safe_open(path, framework="pt") as file:
                    found |= {(where, entry.name): file.get_tensor(entry.name) for entry in own}
            except FileNotFoundError:
                raise WeightsGone(f"{path} is not there; is weights.path a folder that every node sees?") from None
            except Exception as error:  # safetensors raises its own class for every kind of damage
                raise WeightsDamaged(f"{path} cannot be read: {error}") from None
        return found

    def remember(self, shard: Shard) -> None:
        folder = self._folder(shard.name)
        folder.mkdir(parents=True, exist_ok=True)
        partial = folder / f"rank-{shard.rank}.partial"
        partial.write_bytes(shard.dumps())
        partial.rename(folder / f"rank-{shard.rank}.json")

    def recall(self) -> list[Shard]:
        shards = []
        for file in Path(self.path).glob("*-*/rank-*.json"):
            with contextlib.suppress(OSError, TableError):  # what cannot be read was never visible, or is gone
                shard = Shard.loads(file.read_bytes())
                shards.append(replace(shard, wanted=shard.wanted and not (file.parent / RELEASED).exists()))
        return sorted(shards, key=lambda s: (s.name, s.rank))

    def forget(self, name: Name) -> None:
        folder = self._folder(name)
        for table in folder.glob("rank-*.json"):  # first: a version that is half removed is none
            table.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)

    def _names(self) -> list[Name]:
        found = (folder.name.partition("-") for folder in Path(self.path).glob("*-*"))
        return [(int(lineage), int(version)) for lineage, _, version in found if lineage.isdecimal() and version.isdecimal()]

    def sweep(self, newest: Name, kept: Container[Name]) -> None:
        for name in self._names():
            if name < newest and name not in kept:
                self.forget(name)

    def clear(self) -> None:
        """Remove every version, and nothing else that lies there."""
        for name in self._names():
            self.forget(name)

    def release(self, name: Name) -> None:
        with contextlib.suppress(FileNotFoundError):  # forgotten meanwhile
            (self._folder(name) / RELEASED).touch()


@dataclass(frozen=True)
class ObjectTransport(Transport):
    """Ray objects, put by the ranks into their nodes' shared memory. They end with the rank that put them: a reader has them or is told so."""

    def write(self, name: Name, part: str, tensors: Mapping[str, Tensor]) -> tuple[str, Objects]:
        import ray

        where = f"{name[0]}-{name[1]}/{part}"
        return where, {where: ray.put({key: _bytes(tensor) for key, tensor in tensors.items()})}

    def read(self, entries: list[Entry], objects: Objects, deadline_s: float) -> Tensors:
        import ray

        parts = parts_of(entries)
        try:
            values = ray.get([objects[where] for where in parts], timeout=deadline_s)
        except KeyError as error:
            raise WeightsGone(f"the store holds no object of part {error}") from None
        except ray.exceptions.GetTimeoutError:
            raise WeightsGone(f"{len(parts)} parts did not arrive within {deadline_s:.0f} s") from None
        except ray.exceptions.RayError as error:
            raise WeightsGone(f"a part is lost: {type(error).__name__}; its rank or its node has died") from None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nor is it written to
            return {(where, e.name): _tensor(value, e) for (where, own), value in zip(parts.items(), values, strict=True) for e in own}


def _bytes(tensor: Tensor) -> Any:
    import torch

    return tensor.contiguous().view(-1).view(torch.uint8).numpy()


def _tensor(part: Mapping[str, Any], entry: Entry) -> Tensor:
    import torch

    try:
        if not entry.size or 0 not in entry.size:
            return torch.frombuffer(part[entry.name], dtype=getattr(torch, entry.dtype)).view(entry.size)
        return torch.empty(entry.size, dtype=getattr(torch, entry.dtype))
    except (KeyError, RuntimeError, ValueError) as error:
        raise WeightsDamaged(f"part {entry.where} holds no {entry.name} of {entry.size}: {error}") from None
