"""Mutants read from mutants.yaml, and the suites that must notice them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

REPLAY = "tests/integration/replay"
SUITES = {
    "ledger": tuple(
        f"{REPLAY}/test_replay_{name}.py"
        for name in ("ledger", "budgets", "rewards", "give_back", "deaths", "commit_payload", "late_calls", "lost_reply", "model")
    ),
    "embedded": (f"{REPLAY}/test_replay_embedded.py",),
    "parts": ("tests/unit/replay",),
    "settle": ("tests/integration/trainer/test_settle.py",),
}


@dataclass(frozen=True)
class Mutant:
    """`new` in place of `old` in `file`, which breaks the promise numbered `breaks`; `tests` are paths."""

    name: str
    breaks: int
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def load(path: Path) -> tuple[Mutant, ...]:
    """The mutants of a file; an unknown key or suite is an error."""
    found = []
    for entry in yaml.safe_load(path.read_text()):
        suites = entry.pop("tests", ["ledger"])
        found.append(Mutant(**entry, tests=tuple(test for suite in suites for test in SUITES[suite])))
    return tuple(found)


MUTANTS = load(Path(__file__).with_name("mutants.yaml"))
