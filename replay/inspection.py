"""Looking at a run's ledger without touching it: every group with its state, owner, versions, rewards and ages.

One script call reads everything, so what is shown was true at one moment, however busy the run is. `find_runs` tells
which runs a server holds. Nothing here writes; acting on what one sees is the façade's business (`replay.buffer`).
"""

import json
from dataclasses import dataclass, field
from importlib import resources
from typing import Any, Literal

import redis

from replay.cluster import RunClient
from replay.connect import surfaced
from replay.errors import NotInitialised, ReplayError
from replay.keys import key_prefix
from replay.replies import bits, numbers, rows

State = Literal["leased", "waiting", "ready", "claimed", "settled", "evicted", "dead", "unopened"]
FINISHED: tuple[State, ...] = ("settled", "evicted", "dead")


@dataclass(frozen=True)
class GroupView:
    """One index. What its state does not have is None (or empty): a settled group keeps nothing but its end.

    `attempt` counts the times it was leased, `spent` the attempts that failed. `lease_left_s` < 0: the lease has
    expired and nobody has asked for it since. `min_version` is the least version it was to be sampled with,
    `version` the oldest that did, `epoch` the learner epoch of the lease. Ages are seconds of Redis time since it
    was leased, ready, claimed. `failures`: why each failed attempt failed. `requeued`: dead, but to be made again.
    """

    group: int
    state: State
    attempt: int | None = None
    spent: int | None = None
    owner: str | None = None
    lease_left_s: float | None = None
    min_version: int | None = None
    version: int | None = None
    epoch: int | None = None
    rewards: list[float] | None = None
    scores: dict[str, list[float | None]] = field(default_factory=dict)
    revisions: dict[str, str] = field(default_factory=dict)
    bytes: int | None = None
    ref: str | None = None
    step: int | None = None
    leased_age_s: float | None = None
    ready_age_s: float | None = None
    claimed_age_s: float | None = None
    failures: list[str] = field(default_factory=list)
    requeued: bool = False
    meta: dict[str, float | int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class DataView:
    """One unclaimed anchor-data batch: being made by `owner`, or ready."""

    batch: int
    state: Literal["leased", "ready"]
    owner: str | None
    lease_left_s: float | None
    bytes: int | None


@dataclass(frozen=True)
class ClaimView:
    """One step that is claimed and not settled; `published`: its version is live, its slots are free."""

    step: int
    groups: list[int]
    data: list[int]
    published: bool
    age_s: float | None


@dataclass(frozen=True)
class LedgerView:
    """A whole ledger at one moment. `numbers` are its limits and counters; `live` the groups that are leased, waiting,
    ready or claimed, by index; `failures` the reasons of the latest dead groups."""

    run: str
    numbers: dict[str, int]
    last_failure: str
    live: dict[int, GroupView]
    claims: list[ClaimView]
    data: list[DataView]
    ended: dict[State, frozenset[int]]
    failures: dict[int, list[str]]
    requeued: frozenset[int]

    def group(self, index: int) -> GroupView:
        """The view of any index; 'unopened' when the run has not come to it."""
        if index in self.live:
            return self.live[index]
        for state in FINISHED:
            if index in self.ended[state]:
                dead = state == "dead"
                return GroupView(index, state, failures=self.failures.get(index, []) if dead else [], requeued=dead and index in self.requeued)
        return GroupView(index, "unopened")

    def count(self, state: State) -> int:
        """Number of groups in `state`."""
        return len(self.ended[state]) if state in FINISHED else sum(view.state == state for view in self.live.values())

    @property
    def evictions(self) -> dict[str, int]:
        """Evicted groups by reason."""
        found = {name.removeprefix("evicted:"): count for name, count in sorted(self.numbers.items()) if name.startswith("evicted:")}
        return {reason: count for reason, count in found.items() if count}


def find_runs(client: RunClient) -> list[str]:
    """Names of the runs whose ledger this server holds, sorted. Raises `ReplayError` on a cluster, where each run may
    be on another node."""
    with surfaced(client):
        if client.find_nodes():
            raise ReplayError("this is a Redis Cluster, whose nodes hold different runs: name the run")
        return sorted(key.decode().removeprefix("ddrl:{").removesuffix("}:meta") for key in set(client.scan_iter("ddrl:{*}:meta", count=1000)))


def inspect(client: redis.Redis, run: str) -> LedgerView:
    """The ledger of `run` as it is now. Raises `NotInitialised` when the server holds none, `Unreachable`."""
    with surfaced(client):
        reply: Any = client.eval(_script(), 1, key_prefix(run))
    if reply[0] != b"ok":
        raise NotInitialised(f"no ledger of run {run!r} on this server")
    return _view(run, *reply[1:])


def _script() -> str:
    return (resources.files("replay") / "inspection.lua").read_text()


def _view(
    run: str,
    now: int,
    meta: list[bytes],
    live: list[Any],
    leases: list[bytes],
    waiting: list[bytes],
    ready: list[bytes],
    claims: list[Any],
    data: list[Any],
    data_leases: list[bytes],
    data_ready: list[bytes],
    requeued: list[bytes],
    letters: list[bytes],
    bitmaps: list[bytes],
) -> LedgerView:
    """The reply of the script, read."""
    fields = _record(meta)
    deadlines = {int(group): float(deadline) for group, deadline in rows(leases, 2)}
    in_pool, is_ready = {int(g) for g in waiting}, {int(g) for g in ready}
    groups: dict[int, GroupView] = {}
    for number, record in rows(live, 2):
        group = int(number)
        state: State = "ready" if group in is_ready else "waiting" if group in in_pool else "leased"
        groups[group] = _group(group, state, _record(record), now, deadlines.get(group))
    claimed = []
    for step, record, records in rows(claims, 3):
        claim = _record(record)
        at = _number(claim, "claimed_at")
        claimed.append(ClaimView(int(step), _ids(claim, "groups"), _ids(claim, "data"), claim.get("published") == "1", _age(now, at)))
        for number, held in rows(records, 2):
            groups[int(number)] = _group(int(number), "claimed", _record(held), now, None, int(step), at)
    data_deadlines = {int(batch): float(deadline) for batch, deadline in rows(data_leases, 2)}
    done = {int(batch) for batch in data_ready}
    batches = []
    for number, record in rows(data, 2):
        batch, held = int(number), _record(record)
        left = None if batch in done else _left(now, data_deadlines.get(batch))
        batches.append(DataView(batch, "ready" if batch in done else "leased", held.get("owner"), left, _number(held, "bytes")))
    return LedgerView(
        run=run,
        numbers={name: int(value) for name, value in fields.items() if value.removeprefix("-").isdigit()},
        last_failure=fields.get("last_failure", ""),
        live=dict(sorted(groups.items())),
        claims=claimed,
        data=batches,
        ended={state: bits(bitmap) for state, bitmap in zip(FINISHED, bitmaps, strict=True)},
        failures={int(group): reasons.decode().splitlines() for group, reasons in rows(letters, 2)},
        requeued=frozenset(int(group) for group in requeued),
    )


def _group(group: int, state: State, record: dict[str, str], now: int, deadline: float | None, step: int | None = None, at: int | None = None) -> GroupView:
    header: dict[str, Any] = json.loads(record["header"]) if "header" in record else {}
    return GroupView(
        group=group,
        state=state,
        attempt=_number(record, "attempt"),
        spent=_number(record, "spent") or 0,
        owner=record.get("owner"),
        lease_left_s=_left(now, deadline),
        min_version=_number(record, "min_version"),
        version=_number(record, "version"),
        epoch=_number(record, "epoch"),
        rewards=header.get("rewards"),
        scores=header.get("scores", {}),
        revisions=header.get("revisions", {}),
        bytes=_number(record, "bytes"),
        ref=record.get("ref"),
        step=step,
        leased_age_s=_age(now, _number(record, "leased_at")),
        ready_age_s=_age(now, _number(record, "ready_at")),
        claimed_age_s=_age(now, at),
        failures=record.get("failures", "").splitlines(),
        meta=header.get("meta", {}),
    )


def _record(flat: list[bytes]) -> dict[str, str]:
    return {name.decode(): value.decode() for name, value in rows(flat, 2)}


def _number(record: dict[str, str], name: str) -> int | None:
    return int(record[name]) if record.get(name) else None


def _ids(record: dict[str, str], name: str) -> list[int]:
    return list(numbers(record.get(name, "")))


def _age(now: int, since: int | None) -> float | None:
    return None if since is None else (now - since) / 1000


def _left(now: int, deadline: float | None) -> float | None:
    return None if deadline is None else (deadline - now) / 1000
