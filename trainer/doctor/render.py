"""Showing findings: lines for a person, a list for a program."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from trainer.doctor.finding import LEVELS, Finding

MARKS = {"ok": "ok", "warning": "warning", "problem": "PROBLEM"}


def lines(findings: Sequence[Finding]) -> list[str]:
    """A line for each finding and one for its advice; the last one counts them."""
    wide = max((len(f.check) for f in findings), default=0)
    told = []
    for finding in findings:
        told.append(f"{MARKS[finding.level]:<8} {finding.check:<{wide}}  {finding.found}")
        if finding.advice:
            told.append(f"{'':<8} {'':<{wide}}  do: {finding.advice}")
    counts = Counter(f.level for f in findings)
    return [*told, ", ".join(f"{counts[level]} {level}" for level in LEVELS)]


def as_json(findings: Sequence[Finding]) -> str:
    """A list of objects: check, level, found, advice."""
    return json.dumps([asdict(f) for f in findings], indent=2, ensure_ascii=False)
