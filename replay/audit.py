"""Is every group accounted for? A pure check of a ledger snapshot; each finding is a readable line."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Snapshot:
    """What the audit reads, in one look: indices per set, claims as (groups, data batches).

    `group_bytes` and `data_bytes` hold the payload size of every group and batch that has a payload; `revisions` what
    each group was scored by, `expected` what the run expects ('': anything); `references` and `trash` name payloads in
    use and payloads that wait to be deleted.
    """

    meta: dict[str, int]
    live: frozenset[int]
    ready: frozenset[int]
    leases: frozenset[int]
    pool: frozenset[int]
    claims: dict[int, tuple[tuple[int, ...], tuple[int, ...]]]
    finished: dict[str, frozenset[int]]
    data_live: frozenset[int]
    requeued: frozenset[int] = frozenset()
    group_bytes: Mapping[int, int] = field(default_factory=dict)
    data_bytes: Mapping[int, int] = field(default_factory=dict)
    revisions: Mapping[int, str] = field(default_factory=dict)
    expected: str = ""
    references: frozenset[str] = frozenset()
    trash: frozenset[str] = frozenset()


def audit(snapshot: Snapshot) -> list[str]:
    """Empty when every index 0 … next_group - 1 is in exactly one state, the counters agree, and no budget is exceeded."""
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
    if meta.get("deaths", 0) < len(snapshot.finished.get("dead", ())):
        findings.append(f"{len(snapshot.finished['dead'])} groups are dead, only {meta.get('deaths', 0)} deaths were counted")
    if meta.get("claimed", 0) != len(claimed):
        findings.append(f"counter claimed is {meta.get('claimed', 0)}, the ledger holds {len(claimed)}")

    claimed_data = [batch for _, (_, data) in sorted(snapshot.claims.items()) for batch in data]
    expected = list(range(meta.get("data_floor", 0), meta.get("data_next", 0)))
    if claimed_data != expected:
        findings.append(f"claimed data batches are {claimed_data}, expected {expected}")
    waiting = set(range(meta.get("data_next", 0), meta.get("next_data", 0)))
    if snapshot.data_live != waiting:
        findings.append(f"unclaimed data batches are {sorted(snapshot.data_live)}, expected {sorted(waiting)}")
    return findings + _budgets(snapshot, claimed)


def _budgets(snapshot: Snapshot, claimed: set[int]) -> list[str]:
    """Payloads where they must be, bytes as counted, and never more than was allowed."""
    meta = snapshot.meta
    findings: list[str] = []
    complete = snapshot.ready | claimed
    findings += [f"group {group} is ready or claimed but has no payload" for group in sorted(complete - set(snapshot.group_bytes))]
    findings += [f"group {group} has a payload but is neither ready nor claimed" for group in sorted(set(snapshot.group_bytes) - complete)]
    held = sum(snapshot.group_bytes.values()) + sum(snapshot.data_bytes.values())
    if meta.get("bytes", 0) != held:
        findings.append(f"counter bytes is {meta.get('bytes', 0)}, the ledger holds {held}")
    for amount, name, what in (
        (held, "widest_bytes", "bytes are held"),
        (len(snapshot.live), "widest_slots", "groups are in the pipeline"),
        (len(snapshot.live) + len(claimed), "widest_retained", "groups are retained"),
    ):
        if name in meta and amount > meta[name]:
            findings.append(f"{amount} {what}, the budget is {meta[name]}")
    stray = snapshot.requeued - snapshot.finished.get("dead", frozenset())
    findings += [f"group {group} is marked to be made again but is not dead" for group in sorted(stray)]
    if snapshot.expected:
        scored = {group: snapshot.revisions.get(group) or "no named rewards" for group in sorted(snapshot.ready)}
        others = {group: found for group, found in scored.items() if found != snapshot.expected}
        findings += [f"group {group} is ready but scored by {found}, the run expects {snapshot.expected}" for group, found in others.items()]
    both = snapshot.references & snapshot.trash
    findings += [f"payload {ref} is in use and in the trash" for ref in sorted(both)]
    return findings
