"""`benchmarks/pipeline.py --quick` runs: a whole `ddrl train` and the bare loop, on the same number of samples."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.pipeline import markdown

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.long
def test_quick_run_compares_the_same_work() -> None:
    arguments = [sys.executable, "benchmarks/pipeline.py", "--quick", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert (found["updates"], found["samples"]) == (5, 80)  # 4 groups of 4 in each
    for figures in found["sides"].values():
        assert figures["samples_per_s"]["low"] > 0
        assert figures["train_s"]["low"] > 0
    assert "not a measurement" in markdown(found)
