"""The lines of a run: what learner rank 0 wrote to metrics.jsonl and the driver to evaluations.jsonl, as one stream by time.

Invariant: each complete line is told once. A torn line (crash, or a writer in the middle of it) is left out, and so is one that
was told before: the files may be replaced by shorter ones when a restart drops lines.
"""

from __future__ import annotations

import heapq
import json
import os
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

FILES = ("metrics.jsonl", "evaluations.jsonl")

Record = dict[str, Any]


def read_lines(folder: Path, problems: list[str] | None = None) -> list[Record]:
    """Every line of a run folder; files that are not there have none. `problems` is told of what was left out."""
    return MetricsTail(*(folder / name for name in FILES)).read(problems, ended=True)


class MetricsTail:
    """New complete lines since the last `read`, of one file or of several by time.

    Args:
        paths: files of JSON lines; they may not exist yet.
    """

    def __init__(self, *paths: Path) -> None:
        self._files = [_File(path) for path in paths]
        self._seen: set[bytes] = set()

    def read(self, problems: list[str] | None = None, *, ended: bool = False) -> list[Record]:
        """What is new. `ended`: a torn last line is a problem, because nobody is going to finish it."""
        told = problems if problems is not None else []
        streams = [_timed(self._unseen(file.read(told, ended))) for file in self._files]
        return [record for _, record in heapq.merge(*streams, key=lambda timed: timed[0])]

    def _unseen(self, lines: list[tuple[bytes, Record]]) -> Iterator[Record]:
        for line, record in lines:
            digest = blake2b(line, digest_size=12).digest()
            if digest not in self._seen:
                self._seen.add(digest)
                yield record


class _File:
    """How far one file was read. One that was replaced is read from its start."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = self._lines = 0

    def read(self, problems: list[str], ended: bool) -> list[tuple[bytes, Record]]:
        """New lines, each with its object."""
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset, self._lines = inode, 0, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        found = []
        for line in data[:complete].split(b"\n")[:-1]:
            self._lines += 1
            record, fault = _parsed(line)
            if record is not None:
                found.append((line, record))
            elif fault:
                problems.append(f"{self._path.name}: line {self._lines} {fault}; left out.")
        if ended and data[complete:].strip():
            record, _ = _parsed(data[complete:])
            if record is not None:
                found.append((data[complete:], record))
            else:
                problems.append(f"{self._path.name}: the last line ({self._lines + 1}) is cut off, as after a crash; left out.")
        return found


def _parsed(line: bytes) -> tuple[Record | None, str]:
    """The object of a line, or what is wrong with it; neither for an empty line."""
    if not line.strip():
        return None, ""
    try:
        record = json.loads(line)
    except ValueError:
        return None, "is not JSON"
    return (record, "") if isinstance(record, dict) else (None, "is not an object")


def _timed(records: Iterable[Record]) -> Iterator[tuple[float, Record]]:
    """Records with a time that never falls, so that a merge keeps the order of each file."""
    now = 0.0
    for record in records:
        time = record.get("time")
        if isinstance(time, int | float):
            now = max(now, float(time))
        yield now, record
