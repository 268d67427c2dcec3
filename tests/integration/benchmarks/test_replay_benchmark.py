"""`benchmarks/replay.py --quick` runs and its figures keep the ledger's promises. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.ledger.tables import markdown

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.long
def test_quick_run_measures_every_section() -> None:
    arguments = [sys.executable, "benchmarks/replay.py", "--quick", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    for row in found["bandwidth"]["rows"]:
        assert row["commit"]["n"] == 2
        assert min(row[name]["low"] for name in row if name not in ("mb", "groups")) > 0
    assert [row["producers"] for row in found["producers"]["rows"]] == [1, 8, 1, 8]
    assert {row["operation"] for row in found["latency"]["rows"]} >= {"lease", "commit", "claim", "settle"}
    courses = found["staleness"]["rows"]
    assert [row["W"] for row in courses if "refused" in row] == [16]
    for row in courses:
        if "refused" not in row:
            assert row["worst_at_claim"] <= row["S"]
            assert row["worst_before_eviction"] <= row["bound_of_pacing"]
    assert any(row["payload"].startswith("glyph") and row["ratio"] < 1 for row in found["compression"]["rows"])
    page = markdown(found)
    assert page.count("\n### ") == 6
    assert "not a measurement" in page
