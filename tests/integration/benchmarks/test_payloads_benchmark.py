"""`benchmarks/payloads.py --quick` runs and compares what it says. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.payloads import SIDES, markdown

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.long
def test_quick_run_measures_every_side() -> None:
    arguments = [sys.executable, "-m", "benchmarks.payloads", "--quick", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert [row["side"] for row in found["rows"]] == [*SIDES, *SIDES.values()]
    for row in found["rows"]:
        assert all(row[name]["low"] > 0 and row[name]["n"] == 2 for name in row if name != "side")
        assert ("ratio both" in row) == (row["side"] in SIDES)
    assert all(side in markdown(found) for side in SIDES)
