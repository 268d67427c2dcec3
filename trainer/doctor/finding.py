"""What the doctor says of one thing: how bad it is, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "warning", "problem"]
LEVELS: tuple[Level, ...] = ("ok", "warning", "problem")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor.

    Attributes:
        check: what was looked at.
        level: `ok`; `warning`: runs, but worse than it could; `problem`: a run would fail.
        found: what was found.
        advice: what to do about it; empty where nothing is to be done.
    """

    check: str
    level: Level
    found: str
    advice: str = ""


def worst(findings: Iterable[Finding]) -> Level:
    """The worst level among them, `ok` of none."""
    return max((f.level for f in findings), key=LEVELS.index, default="ok")
