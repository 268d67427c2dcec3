"""A source of pictures or clips to a prepared set, as a Ray Data pipeline.

    pictures   slice → pixels (tasks) → latents (codec actors) → shard
    clips      slice → [frames → latent, one clip after another] (codec actors) → shard

A row of the pipeline is a slice, so memory is bounded by slices in flight, which Ray Data holds back. The pixels of a slice of clips are
gigabytes, so they do not travel: a codec actor decodes one clip, encodes it and lets it go. Shards that are there are not made again. This
module alone imports `ray.data`, which costs a second.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from actors.prepared import FORMAT, Broken, Manifest, Row, begin, broken_of, finish, shard_file, shard_rows, write_broken, write_shard
from actors.preparing.clips import decode_clip
from actors.preparing.cropping import BrokenMediaError, decode, fitted
from actors.preparing.readers import Columns, Reader, Slice, fingerprint, make_reader
from actors.sources.example import SourceError
from diffusion.checkpoint import load_codec
from diffusion.digests import codec_digest

BLOCKS = 512
"""Tasks that a source is divided into, at most."""
NOT_FINITE = "the codec makes a latent of it that is not finite"


class PreparationFailed(Exception):
    """A fault while pictures were read or encoded; a worker that died is its cause. What was made is kept."""


class TooManyBroken(PreparationFailed):
    """More inputs are broken than was allowed; the message counts them and says where they are listed."""


@dataclass(frozen=True)
class Preparation:
    """What a set is made of.

    Attributes:
        source: folder or file of pictures or clips.
        out: folder of the set.
        model: policy folder whose codec makes the latents.
        shard_rows: inputs of a shard; of clips, at most.
        max_broken: share of the inputs that may be broken.
        frames, fps: what is taken of a clip, see `actors.preparing.clips`; None of pictures.
    """

    source: Path
    out: Path
    model: Path
    height: int
    width: int
    shard_rows: int = 64
    max_broken: float = 0.05
    columns: Columns = field(default_factory=Columns)
    frames: int | None = None
    fps: float | None = None

    @property
    def clips(self) -> dict[str, Any]:
        """What plan and manifest say of clips, and not of pictures."""
        return {} if self.frames is None else {"frames": self.frames, "fps": self.fps}


def read_slice(reader: Reader, piece: Slice, height: int, width: int) -> tuple[NDArray[np.uint8], list[Row], list[Broken]]:
    """Pixels `[n, height, width, 3]` of a slice, who they are, and what could not be used."""
    pixels, rows, broken = [np.empty((0, height, width, 3), np.uint8)], [], []
    for one in reader.read(piece):
        if isinstance(one, Broken):
            broken.append(one)
            continue
        try:
            image = decode(one.data)
        except BrokenMediaError as error:
            broken.append(Broken(one.name, str(error)))
            continue
        pixels.append(fitted(image, height, width)[None])
        rows.append(Row(one.id, one.text, one.name, *image.size))
    return np.concatenate(pixels), rows, broken


class ShardWriter:
    """Encodes the pixels of slices of pictures and writes their shards. Plain class; Ray Data makes it an actor."""

    def __init__(self, preparation: Preparation, device: str) -> None:
        if device == "cpu":
            torch.set_num_threads(1)
        self.preparation, self.codec = preparation, load_codec(preparation.model, device)

    def write(self, number: int, pixels: NDArray[np.uint8], rows: list[Row], broken: list[Broken]) -> int:
        """Write shard `number`; returns how many inputs are broken. A latent that is not finite makes its input one."""
        p = self.preparation
        shape = (0, *self.codec.latent_shape(p.height, p.width))
        x0 = self.codec.encode(pixels).numpy() if len(pixels) else np.empty(shape, np.float32)
        finite = [bool(np.isfinite(latent).all()) for latent in x0]
        broken = broken + [Broken(row.name, NOT_FINITE) for row, good in zip(rows, finite, strict=True) if not good]
        write_shard(p.out, number, x0[np.array(finite, bool)], [row for row, good in zip(rows, finite, strict=True) if good], broken)
        return len(broken)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch is one slice. A fault is handed on as text: Ray Data would say that user code failed, and not with what."""
        (number,), (data,), (about,), (fault,) = (batch[key] for key in ("number", "pixels", "about", "fault"))
        p, told, broken = self.preparation, json.loads(about), 0
        if not fault:
            pixels = np.frombuffer(data, np.uint8).reshape(-1, p.height, p.width, 3).copy()
            try:
                broken = self.write(int(number), pixels, [Row(**row) for row in told["rows"]], [Broken(**one) for one in told["broken"]])
            except Exception as error:
                fault = _described(error)
        return {"broken": [broken], "fault": [fault]}


class ClipWriter:
    """Reads slices of clips, encodes one clip at a time and writes their shards. Plain class; Ray Data makes it an actor."""

    def __init__(self, preparation: Preparation, reader: Reader, device: str) -> None:
        if device == "cpu":
            torch.set_num_threads(1)
        self.preparation, self.reader, self.codec = preparation, reader, load_codec(preparation.model, device)

    def write(self, number: int, piece: Slice) -> int:
        """Write shard `number` of a slice; returns how many inputs are broken."""
        p, rows, broken = self.preparation, list[Row](), list[Broken]()
        x0 = np.empty((piece.rows, *self.codec.latent_shape(p.height, p.width, p.frames or 1)), np.float32)
        first = np.empty((piece.rows, p.height, p.width, 3), np.uint8)
        for one in self.reader.read(piece):
            if isinstance(one, Broken):
                broken.append(one)
                continue
            try:
                size = self._encode(one.data, x0[len(rows)], first[len(rows)])
                rows.append(Row(one.id, one.text, one.name, *size))
            except BrokenMediaError as error:
                broken.append(Broken(one.name, str(error)))
        write_shard(p.out, number, x0[: len(rows)], rows, broken, first[: len(rows)])
        return len(broken)

    def _encode(self, data: bytes, latent: NDArray[np.float32], first: NDArray[np.uint8]) -> tuple[int, int]:
        """Fill in the latent and the first frame of a clip, which is gone afterwards; returns its own width and height."""
        p = self.preparation
        clip, size = decode_clip(data, p.height, p.width, p.frames or 1, p.fps or 1.0)
        latent[:], first[:] = self.codec.encode(clip[None])[0].numpy(), clip[0]
        if not np.isfinite(latent).all():
            raise BrokenMediaError(NOT_FINITE)
        return size

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """As `ShardWriter`'s."""
        file, first, rows, at, number = (batch[key][0] for key in ("file", "first", "rows", "at", "number"))
        try:
            return {"broken": [self.write(int(number), Slice(str(file), int(first), int(rows), int(at)))], "fault": [""]}
        except Exception as error:
            return {"broken": [0], "fault": [f"{file}: {_described(error)}"]}


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


@dataclass(frozen=True)
class Work:
    """A preparation that was begun: its slices, which of their shards are missing, and what could not even be sliced.

    `about` is what the manifest says of codec and size.
    """

    preparation: Preparation
    reader: Reader
    slices: list[Slice]
    unread: list[Broken]
    missing: list[int]
    about: dict[str, Any]


def begun(p: Preparation) -> Work:
    """Look the source through and begin the set, or go on with it. Needs no Ray.

    Raises:
        SourceError: a source, a size, a number of frames or an `out` that cannot be used.
        CheckpointError: a policy folder without a codec that can be read.
    """
    codec = load_codec(p.model)
    if codec.video != (p.frames is not None):
        what = "clips: say how many frames a second, and how many in all, as the run's sampler does" if codec.video else "pictures, which have no frames"
        raise SourceError(f"{p.model} is a policy of {what} (--frames, --fps)")
    try:
        latent = codec.latent_shape(p.height, p.width, p.frames or 1)
    except ValueError as error:
        raise SourceError(str(error)) from None
    size = shard_rows(p.shard_rows, latent, p.height, p.width)
    reader = make_reader(p.source, p.columns, codec.video)
    pieces = list(reader.plan(size))
    slices = [piece for piece in pieces if isinstance(piece, Slice)]
    unread = [piece for piece in pieces if isinstance(piece, Broken)]
    if not slices:
        raise SourceError(f"{p.source} holds no {'clips' if codec.video else 'pictures'}" + (f"; {unread[0].name}: {unread[0].reason}" if unread else ""))
    about = {"codec": codec_digest(p.model), "height": p.height, "width": p.width} | p.clips
    origin = fingerprint(p.source if p.source.is_dir() else p.source.parent, pieces)
    begin(p.out, {"format": FORMAT, "source": origin, **about, "shard_rows": size, "image": p.columns.image, "text": p.columns.text})
    missing = [number for number in range(len(slices)) if not shard_file(p.out, number).exists()]
    return Work(p, reader, slices, unread, missing, about | {"model": str(p.model.resolve()), "latent": latent})


def prepare(work: Work, workers: int = 1, device: str = "cpu", progress: Callable[[int, int], None] | None = None) -> Manifest:
    """Make what is missing, and finish the set. Ray must be up where something is.

    Args:
        workers: codec actors; on `cuda` each has a GPU.
        progress: told how many shards there are, and of how many.

    Raises:
        PreparationFailed: a worker failed.
        TooManyBroken: see there; broken.jsonl lists them, and what was made is kept.
    """
    shards = len(work.slices)
    broken = len(work.unread) + sum(1 for _ in broken_of(work.preparation.out, shards))
    _check(work, broken)
    for done, found in enumerate(_run(work, workers, device), shards - len(work.missing) + 1):
        broken += found
        _check(work, broken)
        if progress is not None:
            progress(done, shards)
    return finish(work.preparation.out, shards, work.unread, **work.about)


def _check(work: Work, broken: int) -> None:
    """Nothing that comes later can mend a share that is too large already."""
    p, total = work.preparation, sum(piece.rows for piece in work.slices) + len(work.unread)
    if broken <= p.max_broken * total:
        return
    known = [*work.unread, *broken_of(p.out, len(work.slices))]
    write_broken(p.out, known)
    first = "; ".join(f"{one.name}: {one.reason}" for one in known[:3])
    raise TooManyBroken(
        f"{broken} of {total} inputs are broken already, more than --max-broken {p.max_broken:g} allows ({first}); all are in {p.out / 'broken.jsonl'}; "
        "mend the source, or allow more and run the command again"
    )


def _run(work: Work, workers: int, device: str) -> Iterator[int]:
    """Make the missing shards, in whatever order; yields how many inputs of each are broken."""
    if not work.missing:
        return
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    p, reader, items = work.preparation, work.reader, [asdict(work.slices[number]) | {"number": number} for number in work.missing]

    def pixels(row: dict[str, Any]) -> dict[str, Any]:
        piece = Slice(row["file"], row["first"], row["rows"], row["at"])
        try:
            picture, rows, broken = read_slice(reader, piece, p.height, p.width)
        except Exception as error:
            return {"number": row["number"], "pixels": b"", "about": "{}", "fault": f"{piece.file}: {_described(error)}"}
        about = json.dumps({"rows": [asdict(one) for one in rows], "broken": [asdict(one) for one in broken]})
        return {"number": row["number"], "pixels": picture.tobytes(), "about": about, "fault": ""}

    tasks, pictures = ray.data.from_items(items, override_num_blocks=min(len(items), BLOCKS)), p.frames is None
    shared: dict[str, Any] = {"preparation": p, "device": device}
    written = (tasks.map(pixels) if pictures else tasks).map_batches(
        ShardWriter if pictures else ClipWriter,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        fn_constructor_kwargs=shared if pictures else shared | {"reader": reader},
        num_gpus=1 if device != "cpu" else 0,
    )
    try:
        for row in written.iter_rows():
            if row["fault"]:
                raise PreparationFailed(f"a worker failed: {row['fault']}")
            yield int(row["broken"])
    except ray.exceptions.RayError as error:
        raise PreparationFailed("a worker failed") from error
