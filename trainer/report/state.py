"""How a run stands: what the driver wrote to state.json, checked against whether anybody still holds the folder.

running → finished | interrupted | failed          as the driver says
running, and nobody holds the lock → ended         it was killed, or its machine went away, without a word
"""

from __future__ import annotations

import fcntl
import json
from dataclasses import dataclass
from pathlib import Path

from trainer.report.wording import number

STATES = ("running", "finished", "interrupted", "failed")


@dataclass(frozen=True)
class RunState:
    """`name` is one of `STATES`, or `ended`; `started` is the wall clock of the last start, None if unknown."""

    name: str
    reason: str = ""
    started: float | None = None

    def words(self) -> str:
        """For a reader: `interrupted: stopped after update 4 of 60`."""
        name = "ended without a word" if self.name == "ended" else self.name
        return f"{name}: {self.reason}" if self.reason else name


def is_held(folder: Path) -> bool:
    """Whether a driver holds the lock of a run folder."""
    try:
        with (folder / "lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def read_state(folder: Path) -> RunState:
    """How the run in a folder stands, also when its driver could not say so."""
    try:
        told = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError):
        told = {}
    if not isinstance(told, dict):
        told = {}
    name, reason, started = told.get("state"), told.get("reason"), number(told.get("started"))
    if name in STATES and name != "running":
        return RunState(name, reason if isinstance(reason, str) else "", started)
    return RunState("running" if is_held(folder) else "ended", "", started)
