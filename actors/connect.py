"""How an actor reaches the replay buffer: an address that pickles, a client made on arrival."""

from __future__ import annotations

from dataclasses import dataclass

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.payloads import make_payloads


@dataclass(frozen=True)
class Target:
    """A run's replay buffer.

    Attributes:
        url: Redis URL.
        run: the run's key prefix.
        settings: budgets and bounds.
        payloads: where payloads live: `redis`, or a folder that all nodes share.
        wait_s: deadline of a single wait on another part of the run.
    """

    url: str
    run: str
    settings: BufferSettings
    payloads: str = "redis"
    wait_s: float = 120.0

    def buffer(self) -> ReplayBuffer:
        """A connected buffer. Raises ReplayError when Redis cannot be reached."""
        client = connect(self.url)
        return ReplayBuffer(client, self.run, self.settings, make_payloads(self.payloads, client, self.run, self.settings))
