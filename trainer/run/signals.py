"""SIGINT and SIGTERM of a run: the first asks it to stop, another one more than a second later aborts.

Lifecycle: ``install`` → ``held`` while Ray comes up → ``raising`` until training is watched → a count that the watch reads →
``closing``, while everything is taken down and further signals change nothing.

Invariant: between ``install`` and the end of the process the two signals reach this class and nobody else. Ray's core installs a
C++ handler for SIGTERM that ends the process with "Aborted", and a Python one that exits; so while Ray comes up the signals are
blocked, in this thread and in those it starts, and our handlers are put back before they are let through. Processes that Ray
starts meanwhile do not inherit the block, and are no part of our process group: `timeout`, or a terminal that is closed, signals
the whole group, and a run whose Ray is shot cannot checkpoint any more.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_S = 1.0
"""`timeout` signals its child and then the group: what follows within this time is the same request."""


class Interrupted(BaseException):
    """The run was asked to stop. No `Exception`: nothing on the way may take it for a failure of its own.

    Attributes:
        status: exit status, 128 + the number of the signal.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class StopSignals:
    """What was asked of this process so far."""

    def __init__(self) -> None:
        self.raising = True
        """The first signal raises Interrupted at once: there is nothing yet that could be stopped in order."""
        self._asked: list[tuple[int, float]] = []
        self._closing = False

    def install(self) -> None:
        """Take the two signals. Main thread only."""
        for number in SIGNALS:
            signal.signal(number, self._on)

    @property
    def count(self) -> int:
        """Requests so far."""
        return len(self._asked)

    @property
    def status(self) -> int:
        """Exit status of a run that ends because of the first request."""
        return 128 + (self._asked[0][0] if self._asked else signal.SIGINT)

    def closing(self) -> None:
        """From now on everything is taken down anyway."""
        self._closing = True

    def _on(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._closing or (self._asked and now - self._asked[-1][1] < ECHO_S):
            return
        self._asked.append((number, now))
        if self.raising or len(self._asked) > 1:
            self._closing = True
            raise Interrupted("stopped" if self.raising else "aborted", self.status)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Signals wait until the end of the block, and are then ours, whoever installed a handler meanwhile."""
        with ray_starts():
            yield


@contextmanager
def ray_starts() -> Iterator[None]:
    """Around ``ray.init()``, in the main thread: signals wait, and then reach the handlers that were there before."""
    global _detached
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before, outer = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS), _detached
    _detached = True
    try:
        yield
    finally:
        _detached = outer
        for number, handler in handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_detached = False


def _after_fork() -> None:
    if _detached:
        os.setsid()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)


os.register_at_fork(after_in_child=_after_fork)
