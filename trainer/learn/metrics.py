"""The replay ledger as Ray metrics: Prometheus scrapes them from every node, with the prefix `ray_`.

    ddrl_groups{state}             gauge      groups leased, waiting, ready, claimed, settled, evicted, dead
    ddrl_payload_bytes             gauge      payloads not yet settled, against replay.max_bytes
    ddrl_oldest_seconds{state}     gauge      age of the oldest leased, ready and claimed group
    ddrl_lease_expiries_total      counter    leases that ran out
    ddrl_evictions_total{reason}   counter    groups dropped: stale, lineage, zero_variance, …
    ddrl_staleness                 histogram  versions between sampling and training, per claimed group
    ddrl_claim_wait_seconds        histogram  how long the learner waited for a step's groups
    ddrl_settle_lag_seconds        histogram  from a checkpoint that is taken to the settled step

The driver reports the state of the ledger, learner rank 0 what it claimed, Ray Train's controller what it settled. Every
metric carries the run's name; no group or request id is ever a tag.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from ray.util.metrics import Counter, Gauge, Histogram

STATES = ("leased", "waiting", "ready", "claimed", "settled", "evicted", "dead")
SECONDS = [0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0]
VERSIONS = [0.5, 1.5, 2.5, 3.5, 5.5, 8.5, 16.5]


class LedgerMetrics:
    """What the driver sees of the ledger.

    Args:
        run: the run's name.
    """

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._groups = Gauge("ddrl_groups", "Groups of the replay ledger by state", tag_keys=("run", "state"))
        self._bytes = Gauge("ddrl_payload_bytes", "Bytes of payloads not yet settled", tag_keys=("run",))
        self._oldest = Gauge("ddrl_oldest_seconds", "Age of the oldest group in a state", tag_keys=("run", "state"))
        self._expired = Counter("ddrl_lease_expiries_total", "Leases that ran out", tag_keys=("run",))
        self._evicted = Counter("ddrl_evictions_total", "Groups evicted, by reason", tag_keys=("run", "reason"))
        self._before: dict[str, int] = {}

    def update(self, counts: Mapping[str, int]) -> None:
        """Report `ReplayBuffer.counts()`."""
        for state in STATES:
            self._groups.set(counts[state], {**self._run, "state": state})
        self._bytes.set(counts["bytes"], self._run)
        for name, value in counts.items():
            if name == "expired":
                self._grow(self._expired, name, value, self._run)
            elif name.startswith("oldest_"):  # oldest_ready_ms
                self._oldest.set(value / 1000, {**self._run, "state": name.split("_")[1]})
            elif name.startswith("evicted:"):
                self._grow(self._evicted, name, value, {**self._run, "reason": name.removeprefix("evicted:")})

    def _grow(self, counter: Counter, name: str, total: int, tags: dict[str, str]) -> None:
        """Counters add; the ledger keeps totals."""
        more = total - self._before.get(name, 0)
        self._before[name] = total
        if more > 0:
            counter.inc(more, tags)


class ClaimMetrics:
    """What learner rank 0 saw of its claims."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._staleness = Histogram("ddrl_staleness", "Versions between sampling and training", boundaries=VERSIONS, tag_keys=("run",))
        self._wait = Histogram("ddrl_claim_wait_seconds", "Wait for the groups of a step", boundaries=SECONDS, tag_keys=("run",))

    def claimed(self, waited_s: float, staleness: Iterable[int]) -> None:
        """Report one claim."""
        self._wait.observe(waited_s, self._run)
        for versions in staleness:
            self._staleness.observe(versions, self._run)


class SettleMetrics:
    """What Ray Train's controller saw."""

    def __init__(self, run: str) -> None:
        self._run = {"run": run}
        self._lag = Histogram("ddrl_settle_lag_seconds", "From a checkpoint that is taken to the settled step", boundaries=SECONDS, tag_keys=("run",))

    def settled(self, lag_s: float) -> None:
        """Report one settled checkpoint."""
        self._lag.observe(max(lag_s, 0.001), self._run)
