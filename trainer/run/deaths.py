"""Groups that failed every attempt since the driver started; what an earlier start of the run has left does not count."""

from __future__ import annotations

from replay.buffer import ReplayBuffer


class Deaths:
    """Counts on from what the ledger knows when this is made.

    Attributes:
        count: dead groups since then.
        first: why the first of them died, '' while there is none.
    """

    def __init__(self, buffer: ReplayBuffer) -> None:
        self._buffer = buffer
        self._before = buffer.counts()["deaths"]
        self.count, self.first = 0, ""

    def look(self) -> bool:
        """Count again; whether there are more than before."""
        count = self._buffer.counts()["deaths"] - self._before
        if count <= self.count:
            return False
        self.count = count
        if not self.first:
            letter = self._buffer.first_death(self._before)
            self.first = letter.reasons[-1] if letter is not None else "unknown"
        return True
