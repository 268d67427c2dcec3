"""SIGINT and SIGTERM in a process that starts Ray.

Ray's C++ side puts a handler of its own on SIGTERM when a driver connects, which aborts the process (exit status 134): nothing is cleaned
up, and a handler set before is lost. Inside ``ray_starts`` the signals wait; afterwards Python's handlers are back, and what came in
between is delivered to them. Processes that are forked meanwhile do not inherit the waiting.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(after_in_child=_let_through)


@contextlib.contextmanager
def ray_starts() -> Iterator[None]:
    """Around ``ray.init()``, in the main thread: the handlers of before survive it."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:
                signal.signal(number, handler)
        _let_through()
