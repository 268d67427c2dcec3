"""`benchmarks/gpu.py --size tiny --device cpu` runs, and all sides compute the same. No speed is asserted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import table

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/gpu.py", *arguments]
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "1"}  # no pool of compilers for a few small kernels
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.long
def test_the_tiny_size_measures_every_side() -> None:
    done = run("--size", "tiny", "--device", "cpu", "--dtype", "float32", "--repeats", "2", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["providers"]["sdpa"] is None
    assert "NotImplementedError" in found["providers"]["xformers"]
    for workload in found["workloads"]:
        for batch in workload["batches"]:
            assert [row["side"] for row in batch["sides"]] == ["diffusers eager", "sdpa eager", "sdpa compiled"]
            for row in batch["sides"]:
                assert row["relative_error"] < 1e-5
                for name in ("samples_per_s", "tokens_per_s", "utilisation", "ratio_to_diffusers"):
                    assert 0 < row[name]["low"] <= row[name]["median"] <= row[name]["high"]
        assert set(workload["best"]) == {"diffusers eager", "sdpa eager", "sdpa compiled"}
    page = table(found)
    assert page.count("\n### ") == len(found["workloads"]) == 3
    assert "attention xformers: not here" in page


@pytest.mark.parametrize(("arguments", "message"), [(["--size", "tiny", "--only", "flux"], "unknown: flux"), (["--size", "huge"], "invalid choice")])
def test_wrong_arguments_are_refused(arguments: list[str], message: str) -> None:
    done = run("--device", "cpu", *arguments)
    assert done.returncode == 2
    assert message in done.stderr
