"""Is every group accounted for? A pure check of a ledger snapshot; each finding is a readable line."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Snapshot:
    """What the audit reads, in one transaction: indices per set, claims as (groups, data batches)."""

    meta: dict[str, int]
    live: frozenset[int]
    ready: frozenset[int]
    leases: frozenset[int]
    pool: frozenset[int]
    claims: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
    finished: dict[str, frozenset[int]]
    data_live: frozenset[int]


def audit(snapshot: Snapshot) -> list[str]:
    """Empty when every index 0 … next_group - 1 is in exactly one state and the counters agree."""
    meta = snapshot.meta
    findings: list[str] = []
    claimed: set[int] = set()
    for step, (taken, _) in snapshot.claims.items():
        for group in taken:
            if group in claimed:
                findings.append(f"group {group} is claimed twice, the second time by step {step}")
            claimed.add(group)
    states: dict[str, frozenset[int]] = {
        "live": snapshot.live,
        "claimed": frozenset(claimed),
        **snapshot.finished,
    }
    seen: dict[int, str] = {}
    for state, groups in states.items():
        for group in sorted(groups):
            if group in seen:
                findings.append(f"group {group} is both {seen[group]} and {state}")
            seen[group] = state
    opened = meta.get("next_group", 0)
    findings += [f"group {group} is lost: in no state" for group in range(opened) if group not in seen]
    findings += [f"group {group} is {seen[group]} but was never opened" for group in sorted(seen) if group >= opened]

    parts = [snapshot.ready, snapshot.leases, snapshot.pool]
    if frozenset().union(*parts) != snapshot.live or sum(map(len, parts)) != len(snapshot.live):
        findings.append("ready, leased and waiting groups do not partition the live ones")
    for name, groups in snapshot.finished.items():
        if meta.get(name, 0) != len(groups):
            findings.append(f"counter {name} is {meta.get(name, 0)}, the ledger holds {len(groups)}")
    if meta.get("claimed", 0) != len(claimed):
        findings.append(f"counter claimed is {meta.get('claimed', 0)}, the ledger holds {len(claimed)}")

    claimed_data = [batch for _, (_, data) in sorted(snapshot.claims.items()) for batch in data]
    expected = list(range(meta.get("data_floor", 0), meta.get("data_next", 0)))
    if claimed_data != expected:
        findings.append(f"claimed data batches are {claimed_data}, expected {expected}")
    waiting = set(range(meta.get("data_next", 0), meta.get("next_data", 0)))
    if snapshot.data_live != waiting:
        findings.append(f"unclaimed data batches are {sorted(snapshot.data_live)}, expected {sorted(waiting)}")
    return findings
