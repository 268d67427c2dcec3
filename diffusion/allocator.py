"""What glibc does with memory that was freed: kept for the next pass, or given back to the system. On a GPU torch's own allocator keeps it."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings in malloc.h."""
KEPT_BYTES = 2**30


def keep_freed_memory() -> bool:
    """Have glibc keep freed memory in this process, instead of giving it back to the system; False where there is no glibc.

    A forward pass on the CPU frees its activations and asks for as much again in the next one. By default a tensor of some
    megabytes is mapped anew each time, and every page of it faults: thousands of faults a pass, a quarter of its time.
    The process then holds the memory of its largest pass for good, or until `give_back_freed_memory`.
    """
    mallopt = _glibc("mallopt")
    return mallopt is not None and all([mallopt(M_TRIM_THRESHOLD, KEPT_BYTES), mallopt(M_MMAP_THRESHOLD, KEPT_BYTES)])


def give_back_freed_memory() -> None:
    """Give whole pages that are free back to the system, once; they fault when they are asked for again.

    For work that frees tensors of other sizes than it asks for next, such as an export that makes one tensor after the other and keeps them:
    what it frees lies between what it keeps, too small for the next, and a process that keeps freed memory grows by it.
    """
    trim = _glibc("malloc_trim")
    if trim is not None:
        trim(0)


def _glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
