"""`benchmarks/rollout.py --quick` runs, and the sides do the same work. No speed is asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sampling.sides import TOLERANCE
from benchmarks.sampling.tables import markdown

ROOT = Path(__file__).resolve().parents[3]
SIDES = {"limit", "engine", "engine, rollout", "pipeline", "loop"}


@pytest.mark.long
def test_quick_run_measures_every_section() -> None:
    arguments = [sys.executable, "benchmarks/rollout.py", "--quick", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert set(found["workloads"]) == {"uniform", "mixed", "mixed_groups", "small"}
    for workload in found["workloads"].values():
        assert max(workload["check"].values()) < TOLERANCE
        assert set(workload["sides"]) == SIDES
        for side, figures in workload["sides"].items():
            assert figures["samples_per_s"]["n"] == found["repeats"]
            assert 0 < workload["filled"][side]["share"] <= 1
    assert workload["filled"]["loop"]["tokens"] < workload["filled"]["pipeline"]["tokens"] < workload["filled"]["engine"]["tokens"]  # small
    for figures in found["streaming"]["sides"].values():
        assert figures["p50_s"]["low"] <= figures["p99_s"]["low"]
    assert [row["in_flight"] for row in found["growth"]][:3] == [1, 2, 4]
    assert set(found["memory"]["uniform"]) == {"engine", "pipeline"}
    for held in found["memory"]["uniform"].values():
        assert held["peak_mb"] > held["above_loaded_mb"] >= 0
    page = markdown(found)
    assert page.count("\n### Sampling") == 4
    assert "not a measurement" in page
