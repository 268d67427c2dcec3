"""Lines of metrics.jsonl. Learner rank 0 is its only writer.

Invariant: a line is written whole or not at all, and dropped when the update it tells of is made again. What the driver has
to say (evaluations, the engine) goes into a file of its own.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


def append_metrics(folder: Path, record: dict[str, Any]) -> None:
    """Append a record, stamped with the wall clock, to `folder`/metrics.jsonl."""
    line = json.dumps({"time": round(time.time(), 3), **record}, allow_nan=False) + "\n"
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(line)


def drop_metrics_after(folder: Path, step: int) -> None:
    """Forget update lines of steps > `step`: those updates are made again from the checkpoint of `step`."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if record.get("step", 0) <= step:
            kept.append(line)
    partial = path.with_suffix(".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    partial.rename(path)
