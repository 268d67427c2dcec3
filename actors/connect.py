"""How an actor reaches the replay buffer: an address that pickles, a client made on arrival."""

from __future__ import annotations

from dataclasses import dataclass

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect


@dataclass(frozen=True)
class Target:
    """A run's replay buffer.

    Attributes:
        url: Redis URL.
        run: the run's key prefix.
        settings: budgets and bounds.
        wait_s: deadline of a single wait on another part of the run.
    """

    url: str
    run: str
    settings: BufferSettings
    wait_s: float = 120.0

    def buffer(self) -> ReplayBuffer:
        """A connected buffer. Raises ReplayError when Redis cannot be reached."""
        return ReplayBuffer(connect(self.url), self.run, self.settings)
