"""Memory that a forward pass has used stays with the process, and what an export frees does not. (The token budget: test_engine.py.)"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource, torch
from diffusion.allocator import keep_freed_memory

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


EXPORT = """
import sys, threading, torch
from pathlib import Path
from diffusion.allocator import keep_freed_memory
from diffusion.weights import write_weights

def resident():
    return next(int(line.split()[1]) for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))

def made(count):
    for i in range(count):  # of 2 MB each, from others of 4
        yield str(i), (torch.ones(2**20) + i).bfloat16()
        most.append(resident())

assert keep_freed_memory()
most, folder = [], Path(sys.argv[1])
before = resident()
thread = threading.Thread(target=write_weights, args=(folder, made(400), 200 * 2**20))
thread.start()
thread.join()
print((max(most) - before) // 1024, (resident() - before) // 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_an_export_holds_one_file_and_leaves_nothing(tmp_path: Path) -> None:
    """800 MB in files of 200 by a process that keeps freed memory."""
    done = subprocess.run([sys.executable, "-c", EXPORT, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True)
    most, left = map(int, done.stdout.split())
    assert most < 200 + 128 + 128
    assert left < 64
