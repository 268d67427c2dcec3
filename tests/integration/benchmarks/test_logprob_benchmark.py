"""`benchmarks.logprob` runs and gives a row for every precision and guidance."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from benchmarks.logprob import markdown

ROOT = Path(__file__).resolve().parents[3]


def test_rows_of_one_kernel() -> None:
    arguments = [sys.executable, "-m", "benchmarks.logprob", "--kernels", "edm_2ab", "--members", "1", "--json"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout)
    assert [(r["dtype"], r["guidance"]) for r in rows] == [("float32", 1.0), ("float32", 4.5), ("bfloat16", 1.0), ("bfloat16", 4.5)]
    for r in rows:
        assert r["transitions"] == 2 * 19
        assert set(r["by_step"]) == {str(i) for i in range(19)}
        # fp32: a pack of two rows may round the network's output otherwise than a micro-batch; ratios in fp64 show that
        assert 0 <= r["mean"] <= r["largest"] < (1e-5 if r["dtype"] == "float32" else 1)
    assert markdown(rows).count("\n") == 5
