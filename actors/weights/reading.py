"""Reading: the newest version, or exactly one, opened and checked, ready to be put into a model.

    pull(store) ─► View (table) ─► open(deadline) ─► OpenVersion ─► engine.set_weights       every digest agreed before anything is put in place

An open version holds shared or mapped memory and no copy: what comes on top of the model is the piece on its way into it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from actors.weights.shards import digest
from actors.weights.store import View
from actors.weights.table import Entry, Name, Sizes, Table, overlap
from actors.weights.transport import Tensors, WeightsDamaged, WeightsGone
from diffusion.engine.incoming import Piece
from diffusion.weights import shapes_of

Needs = Mapping[str, tuple[Sizes, Sizes]]
"""By tensor, (start, size) of the slice that a reader wants."""


class OpenVersion:
    """A version, or the slices of it that a reader needs, checked (`diffusion.engine.incoming.Incoming`).

    Attributes:
        version, name, digest: of the version.
        shapes: of the slices needed.
    """

    def __init__(self, table: Table, tensors: Tensors, needs: Needs) -> None:
        self.version, self.name, self.digest = table.version, table.name, table.digest
        self.shapes: Mapping[str, Sizes] = {name: size for name, (_, size) in needs.items()}
        self._entries, self._tensors, self._needs = _needed(table, needs), tensors, needs

    def pieces(self) -> Iterator[Piece]:
        for entry in self._entries:
            start, size = self._needs[entry.name]
            shared = overlap(entry, start, size)
            assert shared is not None  # it is needed
            low, extent = shared
            here = tuple(slice(a - s, a - s + n) for a, s, n in zip(low, start, extent, strict=True))
            there = tuple(slice(a - s, a - s + n) for a, s, n in zip(low, entry.start, extent, strict=True))
            yield entry.name, here, self._tensors[entry.where, entry.name][there]


def _needed(table: Table, needs: Needs) -> list[Entry]:
    return [e for e in table.entries if e.name in needs and overlap(e, *needs[e.name]) is not None]


def open_version(view: View, deadline_s: float, needs: Needs | None = None) -> OpenVersion:
    """Fetch and check what a reader needs of a version; None = all of it.

    Raises:
        WeightsGone: some of it is not there any more, or not within `deadline_s`.
        WeightsDamaged: its bytes are not what was handed in.
    """
    table = view.table
    needs = {name: ((0,) * len(shape), shape) for name, shape in table.shapes.items()} if needs is None else needs
    entries = _needed(table, needs)
    try:
        tensors = view.transport.read(entries, view.objects, deadline_s)
        for entry in entries:
            tensor = tensors[entry.where, entry.name]
            if (tuple(tensor.shape), str(tensor.dtype)) != (entry.size, f"torch.{entry.dtype}") or digest(tensor) != entry.digest:
                raise WeightsDamaged(f"{entry.name} in {entry.where}: checksum or shape differs")
    except WeightsDamaged as error:
        raise WeightsDamaged(f"weights of version {table.version} are damaged: {error}") from None
    except WeightsGone as error:
        raise WeightsGone(f"weights of version {table.version} are gone: {error}") from None
    return OpenVersion(table, tensors, needs)


@dataclass(frozen=True)
class Exported:
    """What was trained, of an exported policy: a safetensors file, or the folder of its network.

    Attributes:
        version: the step that it is of.
        path: the file or folder.
        prefix: what stands before the network's own names in it.
    """

    version: int
    path: str
    prefix: str = ""

    def open(self, deadline_s: float) -> OpenFile:
        """See `View.open`."""
        return OpenFile(Path(self.path), self.prefix)


class OpenFile:
    """A safetensors file, or a network's folder of them, as incoming weights, one tensor at a time. Raises what `safe_open` and `shapes_of` raise."""

    digest: str | None = None

    def __init__(self, path: Path, prefix: str) -> None:
        self._prefix = prefix
        self._files = shapes_of(path) if path.is_dir() else _shapes(path)
        self.shapes: Mapping[str, Sizes] = {name.removeprefix(prefix): shape for tensors in self._files.values() for name, shape in tensors.items()}

    def pieces(self) -> Iterator[Piece]:
        for path, tensors in self._files.items():
            with safe_open(path, framework="pt") as file:
                for name in tensors:
                    yield name.removeprefix(self._prefix), (), file.get_tensor(name)


def _shapes(path: Path) -> dict[Path, dict[str, Sizes]]:
    with safe_open(path, framework="pt") as file:
        return {path: {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}}  # noqa: SIM118  # no mapping


def pull(store: Any, have: Name | None, deadline_s: float) -> View | None:
    """`WeightStore.view` of the newest version behind the Ray handle `store`; None when the caller has it, or there is none."""
    import ray

    view: View | None = ray.get(store.view.remote(have), timeout=deadline_s)
    return view
