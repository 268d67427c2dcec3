"""Following metrics.jsonl while others write to it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class MetricsTail:
    """New complete lines since the last `read`. A file that was replaced (a restart dropped some lines) is read again
    from its start, and lines seen before are not repeated.

    Args:
        path: metrics.jsonl; may not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode: int | None = None
        self._offset = 0
        self._seen: set[tuple[Any, ...]] = set()

    def read(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                inode = os.fstat(file.fileno()).st_ino
                if inode != self._inode:
                    self._inode, self._offset = inode, 0
                file.seek(self._offset)
                data = file.read()
        except FileNotFoundError:
            return []
        complete = data.rfind(b"\n") + 1
        self._offset += complete
        fresh = []
        for line in data[:complete].splitlines():
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            name = tuple(record.get(k) for k in ("kind", "split", "weights", "step", "time"))
            if name not in self._seen:
                self._seen.add(name)
                fresh.append(record)
        return fresh
