"""Mutants read from mutants.yaml, and the suites that must notice them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

REPLAY = "tests/integration/replay"
LEARN = "tests/unit/trainer/learn"
SUITES = {
    "ledger": tuple(
        f"{REPLAY}/test_replay_{name}.py"
        for name in ("ledger", "budgets", "rewards", "give_back", "deaths", "commit_payload", "late_calls", "lost_reply", "model")
    ),
    "payloads": (f"{REPLAY}/test_replay_payloads.py",),
    "embedded": (f"{REPLAY}/test_replay_embedded.py",),
    "parts": ("tests/unit/replay",),
    "settle": ("tests/integration/trainer/test_settle.py",),
    "published": (f"{LEARN}/published",),
    "publishing": ("tests/integration/trainer/test_publishing.py",),
    "loop": ("tests/integration/trainer/test_loop.py",),
    **{name: (f"tests/unit/trainer/run/test_{name}.py",) for name in ("watch", "runfolder", "signals", "resources", "hacking")},
    **{
        name: (f"{LEARN}/test_{name}.py",) for name in ("advantages", "objective", "plan", "batch", "learner", "checkpoint", "exports", "ranks", "given_frames")
    },
}


@dataclass(frozen=True)
class Mutant:
    """`new` in place of `old` in `file`; `what` goes wrong then, and `tests` (paths) must notice. `breaks`: the number of the
    ledger's promise that it breaks, 0 in other sections."""

    section: str
    name: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    breaks: int = 0


def load(path: Path) -> tuple[dict[str, str], tuple[Mutant, ...]]:
    """(titles of the sections, the mutants) of a file; an unknown key or suite is an error."""
    titles, found = {}, []
    for section, content in yaml.safe_load(path.read_text()).items():
        titles[section] = content["title"]
        for entry in content["mutants"]:
            suites = entry.pop("tests", content["tests"])
            found.append(Mutant(section, **entry, tests=tuple(test for suite in suites for test in SUITES[suite])))
    return titles, tuple(found)


TITLES, MUTANTS = load(Path(__file__).with_name("mutants.yaml"))
