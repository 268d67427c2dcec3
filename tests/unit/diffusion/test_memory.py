"""Memory that a forward pass has used stays with the process. (The token budget: test_engine.py.)"""

from __future__ import annotations

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from diffusion.engine.memory import keep_freed_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        activations = [torch.ones(2**20) for _ in range(12)]  # 48 MB
        del activations
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

before = faults()
assert keep_freed_memory()
faults()
print(before, faults())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_the_same_work_again_touches_no_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, timeout=120, check=True)
    before, after = map(int, done.stdout.split())
    assert before > 1000
    assert after < before / 20
