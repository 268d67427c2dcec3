"""The ledger's metrics as Prometheus sees them, scraped from a real Ray node."""

from __future__ import annotations

import re
import time

import httpx
import pytest

COUNTS = {
    "leased": 3, "waiting": 1, "ready": 2, "claimed": 4, "settled": 8, "evicted": 1, "dead": 0, "bytes": 4096,
    "oldest_leased_ms": 1500, "oldest_ready_ms": 0, "oldest_claimed_ms": 250, "expired": 2, "evicted:stale": 1, "evicted:lineage": 0,
}  # fmt: skip
SEEN = {
    "ddrl_groups{state=ready}", "ddrl_groups{state=settled}", "ddrl_payload_bytes", "ddrl_oldest_seconds{state=leased}", "ddrl_lease_expiries_total",
    "ddrl_evictions_total{reason=stale}", "ddrl_staleness_count", "ddrl_claim_wait_seconds_count", "ddrl_settle_lag_seconds_count",
}  # fmt: skip


def scraped(port: int) -> dict[str, float]:
    """Samples of our run, by name and own labels: `ddrl_groups{state=ready}`."""
    text = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=10).text
    found = {}
    for name, labels, value in re.findall(r'^ray_(ddrl_\w+)\{([^}]*run="metrics-test"[^}]*)\} (\S+)$', text, re.MULTILINE):
        own = re.findall(r'(state|reason|le)="([^"]*)"', labels)
        found[name + "".join(f"{{{k}={v}}}" for k, v in own)] = float(value)
    return found


@pytest.mark.usefixtures("ray_cluster")
def test_prometheus_sees_the_ledger() -> None:
    import ray

    class Reporter:
        """Lives until its metrics were seen: they leave a process every now and then."""

        def report(self) -> None:
            from trainer.learn.metrics import ClaimMetrics, LedgerMetrics, SettleMetrics

            ledger = LedgerMetrics("metrics-test")
            ledger.update(COUNTS)
            ledger.update(COUNTS | {"expired": 5, "settled": 12})
            ClaimMetrics("metrics-test").claimed(0.5, [0, 1, 1])
            SettleMetrics("metrics-test").settled(2.0)

    reporter = ray.remote(Reporter).remote()
    ray.get(reporter.report.remote(), timeout=120)
    port = ray.nodes()[0]["MetricsExportPort"]
    end, found = time.monotonic() + 120, {}
    # Kept over scrapes: Ray's agent takes metrics in one by one, and forgets a gauge that was not sent again for two of its intervals.
    while not SEEN.issubset(found) and time.monotonic() < end:
        time.sleep(0.2)
        found |= scraped(port)
    ray.kill(reporter)
    assert SEEN.issubset(found), f"not seen: {SEEN - set(found)}"
    assert found["ddrl_groups{state=ready}"] == 2
    assert found["ddrl_groups{state=settled}"] == 12
    assert found["ddrl_payload_bytes"] == 4096
    assert found["ddrl_oldest_seconds{state=leased}"] == 1.5
    assert found["ddrl_lease_expiries_total"] == 5
    assert found["ddrl_evictions_total{reason=stale}"] == 1
    assert "ddrl_evictions_total{reason=lineage}" not in found
    assert found["ddrl_staleness_count"] == 3
    assert found["ddrl_staleness_bucket{le=0.5}"] == 1
    assert found["ddrl_claim_wait_seconds_count"] == found["ddrl_settle_lag_seconds_count"] == 1
