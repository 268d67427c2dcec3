"""Where pictures and clips come from: a source is cut into slices, and a slice is read by itself, anywhere.

A slice names rows of one file; it is what one shard is made of. Planning reads only what says where rows are (lines, tar headers,
row counts), so a plan costs memory by slice, not by picture. What a source names and cannot give is a `Broken` in its place.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from actors.prepared import Broken
from actors.sources.example import SourceError

MAX_BYTES = 256 << 20
"""Of one picture's or clip's file."""


@dataclass(frozen=True)
class Slice:
    """`rows` rows of `file` (relative to the source), from row `first`; `at`: the byte where it begins, where rows are found by bytes."""

    file: str
    first: int
    rows: int
    at: int = 0


@dataclass(frozen=True)
class Record:
    """The encoded bytes of a picture or clip with its caption; `name` says where in the source it is."""

    name: str
    id: str
    text: str
    data: bytes


class Reader(Protocol):
    """A source of pictures or clips. Pickles, so that slices can be read elsewhere."""

    def plan(self, rows: int) -> Iterator[Slice | Broken]:
        """Slices of at most `rows` rows, the same for the same files. Raises SourceError."""
        ...

    def read(self, piece: Slice) -> Iterator[Record | Broken]:
        """What the slice holds: `piece.rows` records or their faults."""
        ...


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; None = the first of `IMAGES` (of clips: `VIDEOS`), `TEXTS` that is there."""

    image: str | None = None
    text: str | None = None


def make_reader(source: Path, columns: Columns, clips: bool = False) -> Reader:
    """The reader of a source of pictures, or of clips, by what the folder or file holds. Raises SourceError where it is none of those known."""
    from actors.preparing.tables import IMAGES, VIDEOS, ArrowReader, ParquetReader, saved_files
    from actors.preparing.tars import CLIPS, PICTURES, TarReader

    kinds, known = ((*CLIPS, *PICTURES), (*VIDEOS, *IMAGES)) if clips else (PICTURES, IMAGES)

    folder = source if source.is_dir() else source.parent

    def files(suffix: str) -> list[str]:
        found = source.rglob(f"*{suffix}") if source.is_dir() else [source] if source.name.endswith(suffix) else []
        return sorted(str(file.relative_to(folder)) for file in found if file.is_file())

    if not source.exists():
        raise SourceError(f"{source} does not exist")
    if (source / "metadata.jsonl").is_file():
        return FolderReader(folder)
    if (source / "state.json").is_file() or (source / "dataset_dict.json").is_file():
        return ArrowReader(folder, saved_files(folder, files("state.json")), columns, known)
    if tars := files(".tar"):
        return TarReader(folder, tars, kinds)
    if tables := files(".parquet"):
        return ParquetReader(folder, tables, columns, known)
    raise SourceError(
        f"{source} is no source of {'clips' if clips else 'pictures'}: give a folder with metadata.jsonl, WebDataset shards (.tar), Parquet files, "
        "or a saved datasets folder"
    )


def fingerprint(folder: Path, pieces: list[Slice | Broken]) -> str:
    """Digest of a plan and of the sizes of its files: another source is another set."""
    digest = hashlib.blake2b(json.dumps([repr(piece) for piece in pieces]).encode(), digest_size=16)
    for file in sorted({piece.file for piece in pieces if isinstance(piece, Slice)}):
        digest.update(f"{file}/{(folder / file).stat().st_size}".encode())
    return digest.hexdigest()


def read_file(file: Path) -> bytes:
    """A file. Raises ValueError or OSError, saying what is wrong with it."""
    size = file.stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"the file has {size >> 20} MiB, more than {MAX_BYTES >> 20}")
    return file.read_bytes()


def record(name: str, row: dict[str, Any], text: object, data: bytes) -> Record | Broken:
    """A record, if it has a caption; its id is the row's own `id`, else the caption, so that equal captions stand in one split."""
    if not isinstance(text, str) or not text.strip():
        return Broken(name, "no caption" if text is None or text == "" or isinstance(text, str) else f"the caption is a {type(text).__name__}, not a text")
    return Record(name, str(row.get("id") or text), text, data)


class FolderReader:
    """A folder of image or video files: `metadata.jsonl` with `file_name`, `text` and, where it is not the text, `id`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def plan(self, rows: int) -> Iterator[Slice | Broken]:
        begin = first = count = 0
        for number, at, _ in self._lines(0):
            if count == rows:
                yield Slice("metadata.jsonl", first, count, begin)
                count = 0
            if count == 0:
                begin, first = at, number
            count += 1
        if count:
            yield Slice("metadata.jsonl", first, count, begin)

    def read(self, piece: Slice) -> Iterator[Record | Broken]:
        for number, _, line in islice(self._lines(piece.at, piece.first), piece.rows):
            name = f"metadata.jsonl line {number + 1}"
            try:
                row = json.loads(line)
                name = str(row["file_name"])
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                yield Broken(name, f"not an object with file_name and text: {error}")
                continue
            try:
                data = read_file(self.folder / name)
            except (OSError, ValueError) as error:
                yield Broken(name, error.strerror or type(error).__name__ if isinstance(error, OSError) else str(error))
                continue
            yield record(name, row, row.get("text"), data)

    def _lines(self, at: int, number: int = 0) -> Iterator[tuple[int, int, bytes]]:
        """Number, offset and content of each line that is not empty."""
        with (self.folder / "metadata.jsonl").open("rb") as file:
            file.seek(at)
            for i, line in enumerate(file, number):
                if line.strip():
                    yield i, at, line
                at += len(line)
