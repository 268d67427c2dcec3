"""Files of JSON lines in a run folder: a line is written whole or not at all; a torn one (crash) is left out when reading."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append a record, stamped with the wall clock. Raises ValueError on a number that is none."""
    line = json.dumps({"time": round(time.time(), 3), **record}, allow_nan=False) + "\n"
    with path.open("a") as file:
        file.write(line)


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a file; none of a file that is not there."""
    for line in path.read_text(errors="replace").split("\n") if path.exists() else []:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict):
            yield record
