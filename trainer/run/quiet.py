"""Keeping the terminal for the display: what libraries print goes to a file of the run folder.

Ray's and gloo's C++ code writes to file descriptor 2 past every Python redirection, so the descriptor itself is moved;
Ray's Python side prints warnings to `sys.stdout`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Append file descriptor 2, `sys.stderr` and `sys.stdout` to `path` inside the block.

    A display that should still be seen must hold the terminal from before.
    """
    sys.stderr.flush()
    kept = os.dup(2)
    with path.open("a", buffering=1) as file:
        os.dup2(file.fileno(), 2)
        try:
            with redirect_stdout(file), redirect_stderr(file):
                yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
