"""When to try again: exponential backoff with full jitter under one deadline. Pure; time and chance are
passed in.

Worked example: base 0.2 s, cap 5 s gives waits uniform in [0, 0.2], [0, 0.4], [0, 0.8], ... [0, 5]; a
server's ``Retry-After: 2`` lifts the next wait to at least 2 s; ``next_wait`` answers None once the wait
would pass the deadline.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable


class Backoff:
    """Waits between attempts of one call. Not shared between calls."""

    def __init__(
        self,
        timeout_s: float,
        base_s: float = 0.2,
        cap_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ) -> None:
        self._clock, self._rng = clock, rng or random.Random()
        self._base_s, self._cap_s, self._attempt = base_s, cap_s, 0
        self._end = clock() + timeout_s

    @property
    def attempts(self) -> int:
        """How many waits have been handed out."""
        return self._attempt

    def remaining(self) -> float:
        """Seconds until the deadline, never negative."""
        return max(0.0, self._end - self._clock())

    def next_wait(self, at_least_s: float = 0.0) -> float | None:
        """Seconds to sleep before the next attempt, or None when the deadline leaves no room for one."""
        ceiling = min(self._cap_s, self._base_s * 2.0 ** min(self._attempt, 30))
        self._attempt += 1
        wait = max(at_least_s, self._rng.uniform(0.0, ceiling))
        return wait if wait < self.remaining() else None


def retry_after_seconds(header: str | None) -> float:
    """Seconds asked for by a ``Retry-After`` header; 0 when absent or given as a date."""
    try:
        return max(0.0, float(header)) if header else 0.0
    except ValueError:
        return 0.0
