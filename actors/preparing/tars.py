"""WebDataset shards: tar files in which the files of one sample follow each other and share their name up to the first dot."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import IO

from actors.prepared import Broken
from actors.preparing.readers import MAX_BYTES, Record, Slice, record

CLIPS = ("mp4", "webm", "mov", "mkv", "avi")
PICTURES = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm")
CAPTIONS = ("text", "caption", "prompt")
"""Keys of a sample's json that may hold its caption, where it has no txt."""

Sample = tuple[str, list[tarfile.TarInfo]]


def _key(member: tarfile.TarInfo) -> str:
    folder, slash, name = member.name.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _kind(member: tarfile.TarInfo) -> str:
    """What follows the first dot: a sample's `seg.png` is not its `png`."""
    return member.name.rpartition("/")[2].partition(".")[2].lower()


def _samples(tar: tarfile.TarFile) -> Iterator[Sample]:
    for key, members in groupby((member for member in tar if member.isfile()), _key):
        yield key, list(members)


class TarReader:
    """Tar files of a folder, one after another. A sample is a picture or clip (a file of the first of `kinds` that is there) with a `.txt`, or a
    `.json` that holds its caption and may hold an `id`."""

    def __init__(self, folder: Path, files: list[str], kinds: tuple[str, ...] = PICTURES) -> None:
        self.folder, self.files, self.kinds = folder, files, kinds

    def plan(self, rows: int) -> Iterator[Slice | Broken]:
        for file in self.files:
            begins: list[int] = []
            fault = None
            with (self.folder / file).open("rb") as data:
                try:
                    with tarfile.open(fileobj=data, mode="r:") as tar:
                        begins.extend(members[0].offset for _, members in _samples(tar))
                        fault = _damage(data, tar.offset)
                except (tarfile.TarError, OSError, ValueError) as error:
                    fault = str(error)
            for first in range(0, len(begins), rows):
                yield Slice(file, first, min(rows, len(begins) - first), begins[first])
            if fault is not None:
                yield Broken(file, f"unreadable after {len(begins)} samples: {fault}")

    def read(self, piece: Slice) -> Iterator[Record | Broken]:
        with (self.folder / piece.file).open("rb") as data:
            data.seek(piece.at)
            with tarfile.open(fileobj=data, mode="r:") as tar:
                for key, members in islice(_samples(tar), piece.rows):
                    yield _record(f"{piece.file}:{key}", tar, {_kind(member): member for member in members}, self.kinds)


def _damage(data: IO[bytes], end: int) -> str | None:
    """What is wrong where reading ended: `tarfile` takes a header that it cannot read for the end of the file."""
    data.seek(end)
    block = data.read(tarfile.BLOCKSIZE)
    return None if not block.strip(b"\0") else f"no header at byte {end}"


def _record(name: str, tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo], kinds: tuple[str, ...]) -> Record | Broken:
    media = next((members[kind] for kind in kinds if kind in members), None)
    if media is None:
        return Broken(name, f"no {'clip' if kinds[0] in CLIPS else 'picture'} among its files ({', '.join(sorted(members))})")
    if media.size > MAX_BYTES:
        return Broken(name, f"the file has {media.size >> 20} MiB, more than {MAX_BYTES >> 20}")

    def content(member: tarfile.TarInfo) -> bytes:
        file = tar.extractfile(member)
        return b"" if file is None else file.read()

    try:
        about = json.loads(content(members["json"])) if "json" in members else {}
        if not isinstance(about, dict):
            raise ValueError("its json is no object")
        text = content(members["txt"]).decode().strip() if "txt" in members else next((about[key] for key in CAPTIONS if key in about), None)
        return record(name, about, text, content(media))
    except (tarfile.TarError, OSError, ValueError) as error:  # ValueError: neither JSON nor UTF-8
        return Broken(name, str(error))
