"""`benchmarks.learner_memory` runs both sides and a rank that reads its own part takes less."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.learner_memory import markdown

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.long
def test_both_sides_of_a_tiny_policy() -> None:
    arguments = [sys.executable, "-m", "benchmarks.learner_memory", "--quick", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert {side: len(ranks) for side, ranks in found["sides"].items()} == {"own part": 2, "whole": 2}
    assert all(rank["masters"] == found["masters"] <= rank["peak"] for ranks in found["sides"].values() for rank in ranks)
    assert markdown(found).count("\n") == 5
