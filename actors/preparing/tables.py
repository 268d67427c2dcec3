"""Tables with a column of pictures or clips and one of captions: Parquet files, and folders that Hugging Face `datasets` saved.

A picture or clip is its encoded bytes, or `datasets`' pair of `bytes` and `path`. Parquet is read by batches inside a row group; the arrow files of
`save_to_disk` are memory-mapped streams of record batches.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.prepared import Broken
from actors.preparing.readers import Columns, Record, Slice, read_file, record
from actors.sources.example import SourceError

if TYPE_CHECKING:
    import pyarrow as pa

IMAGES = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes", "bytes")
VIDEOS = ("video", "clip", "mp4", "video_bytes")
TEXTS = ("text", "caption", "prompt", "txt")


class _TableReader:
    """What both kinds share: columns, and rows to records."""

    def __init__(self, folder: Path, files: list[str], columns: Columns, known: tuple[str, ...] = IMAGES) -> None:
        """`known`: names that a column of pictures or clips may have."""
        self.folder, self.files, self.columns, self.known = folder, files, columns, known

    def _opened(self, file: str) -> tuple[pa.Schema, Iterator[int]]:
        """The file's schema, and the rows of each of its parts. Raises OSError or ValueError (pyarrow's errors are either)."""
        raise NotImplementedError

    def _batches(self, piece: Slice, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Batches that hold the slice's rows, each with the number of its first row."""
        raise NotImplementedError

    def plan(self, rows: int) -> Iterator[Slice | Broken]:
        for file in self.files:
            start = 0
            try:
                schema, parts = self._opened(file)
                self._names(file, schema)
                for count in parts:
                    yield from (Slice(file, start + first, min(rows, count - first)) for first in range(0, count, rows))
                    start += count
            except SourceError:
                raise
            except (OSError, ValueError) as error:
                yield Broken(file, f"unreadable after {start} rows: {error}")

    def _names(self, file: str, schema: pa.Schema) -> list[str]:
        """Columns of picture or clip, caption and, where there is one, id."""

        def find(what: str, wanted: str | None, known: tuple[str, ...]) -> str:
            name = next((n for n in ([wanted] if wanted else known) if n in schema.names), None)
            if name is None:
                raise SourceError(
                    f"{file} has no {what} column {wanted or 'among ' + ', '.join(known)}; it has {', '.join(schema.names)}: name one with --{what}"
                )
            return name

        names = [find("image", self.columns.image, self.known), find("text", self.columns.text, TEXTS)]
        return names + ["id"] * ("id" in schema.names and "id" not in names)

    def read(self, piece: Slice) -> Iterator[Record | Broken]:
        names = self._names(piece.file, self._opened(piece.file)[0])
        number, end = piece.first, piece.first + piece.rows
        try:
            for start, batch in self._batches(piece, names):
                while number < min(end, start + batch.num_rows):
                    row = {name: batch.column(name)[number - start].as_py() for name in names}
                    yield self._record(f"{piece.file} row {number}", row, *names[:2])
                    number += 1
        except (OSError, ValueError) as error:  # damage beyond what the plan read
            yield from (Broken(f"{piece.file} row {lost}", str(error)) for lost in range(number, end))

    def _record(self, name: str, row: dict[str, Any], image: str, text: str) -> Record | Broken:
        value = row[image]
        try:
            if isinstance(value, dict):
                value = value.get("bytes") or (read_file(self.folder / value["path"]) if value.get("path") else None)
        except (OSError, ValueError) as error:
            return Broken(name, f"{row[image].get('path')}: {error}")
        if not isinstance(value, bytes):
            what = "clip" if self.known[0] in VIDEOS else "picture"
            return Broken(name, f"no {what}" if value is None else f"column {image} holds a {type(value).__name__}, not a {what}'s bytes")
        return record(name, row, row[text], value)


class ParquetReader(_TableReader):
    """Parquet files, slices inside row groups."""

    def _opened(self, file: str) -> tuple[pa.Schema, Iterator[int]]:
        from pyarrow import parquet

        table = parquet.ParquetFile(self.folder / file)
        return table.schema_arrow, (table.metadata.row_group(i).num_rows for i in range(table.num_row_groups))

    def _batches(self, piece: Slice, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        from pyarrow import parquet

        with parquet.ParquetFile(self.folder / piece.file) as table:
            group, start = 0, 0
            while start + table.metadata.row_group(group).num_rows <= piece.first:
                start += table.metadata.row_group(group).num_rows
                group += 1
            for batch in table.iter_batches(piece.rows, row_groups=[group], columns=names):
                yield start, batch
                start += batch.num_rows
                if start >= piece.first + piece.rows:
                    return


def saved_files(folder: Path, states: list[str]) -> list[str]:
    """The arrow files that the `state.json`s of a saved folder name; others beside them are caches. Raises SourceError."""
    found = []
    for state in states:
        try:
            named = [str(entry["filename"]) for entry in json.loads((folder / state).read_text())["_data_files"]]
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise SourceError(f"{folder / state} does not name its data files as datasets' save_to_disk does: {error!r}") from None
        found += [str(Path(state).with_name(name)) for name in named]
    return found


class ArrowReader(_TableReader):
    """The `.arrow` files of a folder that `save_to_disk` wrote, of all its splits; ddrl splits by id, whatever theirs were."""

    def _stream(self, file: str) -> pa.RecordBatchStreamReader:
        import pyarrow as pa

        return pa.ipc.open_stream(pa.memory_map(str(self.folder / file)))

    def _opened(self, file: str) -> tuple[pa.Schema, Iterator[int]]:
        stream = self._stream(file)
        return stream.schema, (batch.num_rows for batch in stream)

    def _batches(self, piece: Slice, names: list[str]) -> Iterator[tuple[int, pa.RecordBatch]]:
        start = 0
        for batch in self._stream(piece.file):
            if start + batch.num_rows > piece.first:
                yield start, batch
            start += batch.num_rows
            if start >= piece.first + piece.rows:  # what comes after may be damaged
                return
