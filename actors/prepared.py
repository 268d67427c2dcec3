"""A prepared set on disk: clean latents of pictures or clips and their captions, made once, read by shard.

    plan.json                  what the set is made of; who goes on with it must want the same
    shards/00000.safetensors   `x0` fp32 [n, C, h, w], of clips [n, C, f, h, w] and `first` uint8 [n, H, W, 3], their first frames; in its header
                               who its rows are, what was broken, and a checksum of the tensors
    index.parquet              one row an example: id, text, split, shard, row, name, width, height
    broken.jsonl               inputs that could not be used: name, reason
    prepared.json              counts and the digest; written last

Lifecycle: `begin` → `write_shard` in any order, by anybody → `finish`. A shard appears whole (rename) and is a function of its slice
of the input alone, so a set that was killed anywhere and finished later is the same to the digest. Without prepared.json
a set is unfinished, and nobody trains on it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from actors.sources.example import SourceError, split_of
from diffusion.config import Strict

FORMAT = 1
SHARD_BYTES = 128 << 20
"""Most bytes of a shard of clips, if it has more than one: whoever makes it holds it."""
PLAN, INDEX, BROKEN, MANIFEST = "plan.json", "index.parquet", "broken.jsonl", "prepared.json"


class PreparedError(SourceError):
    """A set that cannot be read, or gone on with; the message names the folder and the remedy."""


@dataclass(frozen=True)
class Row:
    """An example of a shard. `name`: the input it was made from; `width`, `height`: that input's size in pixels, of a clip its frames'."""

    id: str
    text: str
    name: str
    width: int
    height: int


@dataclass(frozen=True)
class Broken:
    """An input that could not be used, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Shard:
    """What a shard's header says."""

    rows: list[Row]
    broken: list[Broken]
    checksum: str


class Manifest(Strict):
    """prepared.json.

    Attributes:
        digest: of every latent, caption, id and broken input, in order; equal sets have equal digests, wherever they lie.
        codec: `codec_digest` of the policy that made the latents, whose folder was `model`.
        height, width: of the pictures in pixels; latent: [C, h, w].
        frames, fps: of clips, whose latent is [C, f, h, w]; None of pictures.
    """

    format: int
    digest: str
    codec: str
    model: str
    height: int
    width: int
    latent: tuple[int, ...]
    rows: int
    broken: int
    shards: int
    splits: dict[str, int]
    frames: int | None = None
    fps: float | None = None

    @property
    def kind(self) -> str:
        """What it is of: `pictures`, or `clips of 9 frames at 16 a second`."""
        return "pictures" if self.frames is None else f"clips of {self.frames} frames at {self.fps:g} a second"


def shard_rows(rows: int, latent: Sequence[int], height: int, width: int) -> int:
    """Inputs of a shard: `rows`, of clips no more than `SHARD_BYTES` of latents and first frames, and one at least."""
    return rows if len(latent) == 3 else max(1, min(rows, SHARD_BYTES // (4 * math.prod(latent) + 3 * height * width)))


def shard_file(folder: Path, number: int) -> Path:
    """Where shard `number` is."""
    return folder / "shards" / f"{number:05d}.safetensors"


def write_whole(file: Path, data: bytes) -> None:
    """Write a file that is there whole or not at all, whoever else writes it too."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    with partial.open("wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    partial.replace(file)


def begin(folder: Path, plan: dict[str, Any]) -> None:
    """Start a set, or go on with the one that is there.

    Raises:
        PreparedError: the folder holds something else, or a set with another plan; the message names what differs.
    """
    file = folder / PLAN
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(f.suffix != ".partial" for f in folder.iterdir())):
            raise PreparedError(f"{folder} is not empty and holds no prepared set; give another folder")
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(file, _json(plan))
    (folder / "shards").mkdir(exist_ok=True)
    there = _read(file)
    differs = [f"{key} is {there.get(key)!r} there and {plan.get(key)!r} now" for key in sorted({*plan, *there}) if there.get(key) != plan.get(key)]
    if differs:
        raise PreparedError(f"{folder} holds a set that was begun otherwise: {'; '.join(differs)}; ask for the same, or give another folder")


def checksum(x0: NDArray[np.float32], first: NDArray[np.uint8] | None = None) -> str:
    """xxh3 of a shard's latents, and of the first frames of clips behind them."""
    digest = xxhash.xxh3_128(np.ascontiguousarray(x0).data)
    if first is not None:
        digest.update(np.ascontiguousarray(first).data)
    return digest.hexdigest()


def write_shard(
    folder: Path, number: int, x0: NDArray[np.float32], rows: Sequence[Row], broken: Sequence[Broken], first: NDArray[np.uint8] | None = None
) -> None:
    """Write shard `number`; `x0` fp32 `[n, C, h, w]`, one for each of `rows`, or of clips `[n, C, f, h, w]` with their `first` frames
    uint8 `[n, H, W, 3]`."""
    if len(x0) != len(rows) or x0.dtype != np.float32:
        raise ValueError(f"a shard needs one fp32 latent for each of its {len(rows)} rows, got {x0.dtype} {x0.shape}")
    if (first is not None) != (x0.ndim == 5) or (first is not None and (len(first) != len(rows) or first.dtype != np.uint8)):
        raise ValueError(f"a shard needs one uint8 first frame for each of its {len(rows)} clips, and of pictures none")
    about = {"rows": [asdict(row) for row in rows], "broken": [asdict(one) for one in broken], "checksum": checksum(x0, first)}
    tensors: dict[str, NDArray[Any]] = {"x0": np.ascontiguousarray(x0)} | ({} if first is None else {"first": np.ascontiguousarray(first)})
    write_whole(shard_file(folder, number), save(tensors, {"about": json.dumps(about)}))  # one entry: their order is not kept


def read_header(file: Path) -> tuple[str, Shard]:
    """A shard's header, as it is written and as it is meant. Raises PreparedError."""
    try:
        with safe_open(file, "np") as data:
            text = data.metadata()["about"]
        about = json.loads(text)
        return text, Shard([Row(**row) for row in about["rows"]], [Broken(**one) for one in about["broken"]], about["checksum"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise PreparedError(f"shard {file} cannot be read ({error}); remove it and prepare the set again, which makes what is missing") from None


def broken_of(folder: Path, shards: int) -> Iterator[Broken]:
    """What was broken in those of the `shards` that are there."""
    for number in range(shards):
        if (file := shard_file(folder, number)).exists():
            yield from read_header(file)[1].broken


def write_broken(folder: Path, broken: Sequence[Broken]) -> None:
    """Write broken.jsonl."""
    write_whole(folder / BROKEN, "".join(json.dumps(asdict(one)) + "\n" for one in broken).encode())


def finish(folder: Path, shards: int, broken: Sequence[Broken], **about: Any) -> Manifest:
    """Write index, broken.jsonl and, last, the manifest of a set whose `shards` are all there.

    Args:
        broken: inputs that never got as far as a shard.
        about: `codec`, `model`, `height`, `width`, `latent` of the manifest, and of clips `frames`, `fps`.
    """
    import pyarrow as pa
    from pyarrow import parquet

    texts, numbers = ("id", "text", "split", "name"), ("shard", "row", "width", "height")
    schema = pa.schema([(name, pa.string()) for name in texts] + [(name, pa.int32()) for name in numbers])
    clips = [about["frames"], about["fps"]] if about.get("frames") is not None else []
    digest = hashlib.blake2b(json.dumps([FORMAT, about["codec"], about["height"], about["width"], *clips, *map(asdict, broken)]).encode(), digest_size=16)
    splits, left_out = Counter({"train": 0, "dev": 0, "test": 0}), list(broken)
    partial = folder / f"{INDEX}.{os.getpid()}.partial"
    with parquet.ParquetWriter(partial, schema) as index:
        for number in range(shards):
            text, shard = read_header(shard_file(folder, number))
            digest.update(text.encode())
            left_out += shard.broken
            lines = [asdict(row) | {"split": split_of(row.id), "shard": number, "row": i} for i, row in enumerate(shard.rows)]
            splits.update(line["split"] for line in lines)
            index.write_table(pa.Table.from_pylist(lines, schema))
    partial.replace(folder / INDEX)
    write_broken(folder, left_out)
    manifest = Manifest(format=FORMAT, digest=digest.hexdigest(), rows=splits.total(), broken=len(left_out), shards=shards, splits=dict(splits), **about)
    write_whole(folder / MANIFEST, _json(manifest.model_dump(exclude_none=True)))
    for stray in folder.rglob("*.partial"):
        stray.unlink(missing_ok=True)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a finished set. Raises PreparedError."""
    if not (folder / MANIFEST).exists():
        unfinished = (folder / PLAN).exists()
        why = "unfinished; run the command that makes it once more" if unfinished else "no prepared set (ddrl prepare-data, ddrl presample)"
        raise PreparedError(f"{folder} is {why}")
    values = _read(folder / MANIFEST)
    if values.get("format") != FORMAT:
        raise PreparedError(f"{folder} has format {values.get('format')}, this build reads {FORMAT}; prepare the data again")
    try:
        return Manifest.model_validate(values)
    except ValidationError as error:
        raise PreparedError(f"{folder / MANIFEST} is damaged: {error.errors()[0]['msg']}; run the command that makes the set once more") from None


def _json(values: dict[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def _read(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise PreparedError(f"{file} cannot be read: {error}") from None
    return values if isinstance(values, dict) else {}
