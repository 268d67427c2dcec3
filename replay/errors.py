"""Everything the replay buffer raises. Each message names the numbers that clash and what to do next."""

from collections.abc import Mapping


class ReplayError(Exception):
    """Base of all replay errors."""


class Unreachable(ReplayError):
    """The Redis server does not answer (never contains the password)."""


class UnsuitableServer(ReplayError):
    """The server answers but its version or settings would lose groups."""


class ImpossibleSettings(ReplayError):
    """The settings cannot work; the message shows the arithmetic."""


class BudgetExceeded(ImpossibleSettings):
    """Payloads of the measured size cannot fit `max_bytes`, or no room for one appeared before the deadline."""


class NotInitialised(ReplayError):
    """No `initialise()` has been run for this run name on this server."""


class InUse(ReplayError):
    """The ledger shall be deleted but leases are alive."""


class Fenced(ReplayError):
    """The caller belongs to an older learner epoch; a newer learner owns the ledger."""

    def __init__(self, epoch: int, current: int) -> None:
        super().__init__(f"epoch {epoch} is fenced off: the ledger is at epoch {current}; stop this learner")
        self.epoch = epoch
        self.current = current


class OutOfOrder(ReplayError):
    """A step was claimed, published, settled or rolled back out of order."""


class CheckpointConflict(ReplayError):
    """The ids stored in a checkpoint contradict the ledger: the two belong to different runs or histories."""


class ClaimTimeout(ReplayError):
    """A claim did not become ready in time; `counts` holds the ledger's counts per state."""

    def __init__(self, step: int, seconds: float, counts: Mapping[str, int], last_failure: str) -> None:
        shown = ", ".join(f"{name} {counts[name]}" for name in ("leased", "waiting", "ready", "claimed", "evicted", "dead", "data_ready", "version"))
        tail = f"; last failure: {last_failure}" if last_failure else ""
        super().__init__(f"claim of step {step} is not ready after {seconds:.1f} s: {shown}{tail}")
        self.step = step
        self.counts = dict(counts)


class PayloadMissing(ReplayError):
    """The ledger knows the payload but the store does not hold it."""


class PayloadCorrupt(ReplayError):
    """The stored bytes do not match the checksum in the ledger."""


class EmbeddedServerError(ReplayError):
    """The private redis-server could not be started, found or stopped."""
