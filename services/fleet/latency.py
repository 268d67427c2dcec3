"""How long recent calls took: a window of seconds and its quantiles."""

from __future__ import annotations

from collections import deque

WINDOW = 1024


class Latency:
    """The last ``WINDOW`` calls of one reward."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=WINDOW)

    def add(self, seconds: float) -> None:
        """One call that gave results."""
        self._seconds.append(seconds)

    def quantiles(self) -> dict[str, float | None]:
        """Fields ``p50_s`` and ``p99_s`` of ``ModelHealth``, by nearest rank; None before the first call."""
        ordered = sorted(self._seconds)
        return {name: ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else None for name, q in (("p50_s", 0.5), ("p99_s", 0.99))}
