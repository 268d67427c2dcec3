"""A prepared set as a source: captions from its index, latents and first frames from its shards when they are looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from actors.prepared import INDEX, PreparedError, read_manifest, shard_file
from actors.sources.example import Example

if TYPE_CHECKING:
    import pyarrow as pa


@lru_cache(maxsize=64)
def _rows(file: Path, name: str) -> Any:
    """A tensor of a shard, mapped into memory; rows are read as they are asked for."""
    try:
        opened: Any = safe_open(file, "np")
        return opened.get_slice(name)
    except (OSError, SafetensorError) as error:
        raise PreparedError(f"shard {file} cannot be read ({error}); remove it and prepare the set again, which makes what is missing") from None


@dataclass(frozen=True)
class StoredLatent:
    """Row `row` of a shard."""

    file: Path
    row: int

    def load(self) -> NDArray[np.float32]:
        """fp32 `[C, h, w]`, or `[C, f, h, w]`. Raises PreparedError."""
        latent: NDArray[np.float32] = _rows(self.file, "x0")[self.row]
        return latent


@dataclass(frozen=True)
class StoredFrame:
    """The first frame of the clip that is row `row` of a shard."""

    file: Path
    row: int

    def load(self) -> NDArray[np.uint8]:
        """uint8 RGB `[H, W, 3]`. Raises PreparedError."""
        frame: NDArray[np.uint8] = _rows(self.file, "first")[self.row]
        return frame


@lru_cache(maxsize=4)
def _index(folder: Path, digest: str) -> pa.Table:
    """The index of a set, and of no other that stood in the same folder."""
    from pyarrow import parquet

    try:
        return parquet.read_table(folder / INDEX, columns=["id", "text", "shard", "row"]).combine_chunks()
    except (OSError, ValueError) as error:
        raise PreparedError(f"{folder / INDEX} cannot be read ({error}); run the command that makes the set once more") from None


class PreparedSource(Sequence[Example]):
    """Examples of a finished set, in its order. Raises PreparedError for a folder that cannot be used."""

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        self.manifest = read_manifest(self.folder)
        self._table = _index(self.folder, self.manifest.digest)
        if not len(self):
            raise PreparedError(f"prepared set {path} holds no examples")

    def __len__(self) -> int:
        return int(self._table.num_rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        name, text, shard, row = (self._table.column(column)[index].as_py() for column in ("id", "text", "shard", "row"))
        file = shard_file(self.folder, shard)
        return Example(name, text, latent=StoredLatent(file, row), first=StoredFrame(file, row) if self.manifest.frames is not None else None)

    def draw(self, rng: np.random.Generator) -> Example:
        return self[int(rng.integers(len(self)))]
