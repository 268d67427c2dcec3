"""The ledger of one run in Redis: each method is one script call, each reply a typed value or a typed error.

Lifecycle of a group: leased → ready → claimed(step) → settled, or evicted(reason) / dead(reason). Invariant:
every index below `next_group` is in exactly one of these states, whatever process dies between two calls. The
rules themselves are in `replay/lua/`; payload bytes are the façade's business (`replay.buffer`).
"""

from collections.abc import Collection, Sequence
from typing import Any

import redis
from redis.client import Pipeline

from replay.audit import Snapshot
from replay.connect import surfaced
from replay.errors import (
    CheckpointConflict,
    Fenced,
    NotInitialised,
    OutOfOrder,
    PayloadMissing,
    ReplayError,
)
from replay.policy import BufferSettings, budget_error, check_server
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader, Lease
from replay.scripts import Scripts


class Ledger:
    """Script calls for one run."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        if not run or any(char in "{}* \t\n" for char in run):
            raise ReplayError(f"run name {run!r} must be non-empty, without braces, stars or blanks")
        self.prefix = f"ddrl:{{{run}}}:"
        self._client = client
        self._run = run
        self._scripts = Scripts(client, self.prefix)

    def initialise(self, settings: BufferSettings, payloads_in_redis: bool) -> None:
        """Check the server, then write the limits the scripts read; existing counters stay as they are."""
        settings.check()
        with surfaced(self._client):
            info: Any = self._client.info()
            recorded: Any = self._client.hget(self.prefix + "meta", "server_version")
            check_server(
                str(info["redis_version"]),
                self._options(),
                int(info.get("total_system_memory", 0)),
                settings,
                payloads_in_redis,
                recorded.decode() if recorded else None,
            )
            self._client.hset(
                self.prefix + "meta",
                mapping={
                    "slots": settings.slots,
                    "retained": settings.retained_groups,
                    "data_retained": settings.retained_data,
                    "max_bytes": settings.max_bytes,
                    "lease_ms": int(settings.lease_s * 1000),
                    "max_attempts": settings.max_attempts,
                    "G": settings.groups_per_step,
                    "D": settings.data_per_step,
                    "S": settings.max_staleness,
                    "W": settings.window,
                    "data_depth": settings.data_depth,
                    "remake": int(settings.remake_cut_off),
                    "server_version": str(info["redis_version"]),
                },
            )

    def _options(self) -> dict[str, str]:
        options: dict[str, str] = {}
        for name in ("maxmemory", "maxmemory-policy", "appendonly"):
            try:
                found: Any = self._client.config_get(name)
            except redis.ResponseError:  # managed services forbid CONFIG; their settings stay unchecked
                return options
            options.update({str(key): str(value) for key, value in found.items()})
        return options

    def _run_script(self, name: str, *args: str | int) -> list[Any]:
        with surfaced(self._client):
            reply = self._scripts.run(name, *args)
        return self._checked(reply)

    def _checked(self, reply: list[Any], epoch: int = -1) -> list[Any]:
        if reply[0] == "uninitialised":
            raise NotInitialised(f"run {self._run!r} has no ledger on this server: call initialise() first")
        return reply

    def lease(self, token: str, owner: str) -> Lease | None:
        """None: nothing may start now. Raises ReplayError when the run makes no groups."""
        reply = self._run_script("lease", token, owner)
        if reply[0] == "no_groups":
            raise ReplayError("groups_per_step is 0: this run makes no groups")
        if reply[0] == "wait":
            return None
        _, group, attempt, min_version, epoch = reply
        return Lease(group, attempt, token, min_version, epoch)

    def extend(self, lease: Lease) -> bool:
        return bool(self._run_script("extend", lease.group, lease.token)[0] == "ok")

    def batch(self) -> Pipeline:
        """Commands sent together, in order, without a transaction."""
        return self._client.pipeline(transaction=False)

    def commit(self, lease: Lease, header: GroupHeader, ref: str, key: str, lineage: int | None, batch: Pipeline) -> bool:
        """Sends `batch` (which holds the payload write, if any) with the ledger entry behind it."""
        args: tuple[str | int, ...] = (
            lease.group,
            lease.token,
            header.version,
            "" if lineage is None else lineage,
            header.bytes,
            header.to_json(),
            ref,
            key,
        )
        return self._finish("commit", batch, args, f"group {lease.group}") == "ok"

    def commit_data(self, number: int, size: int, checksum: str, ref: str, key: str, batch: Pipeline) -> bool:
        """False: another copy of this batch is already there."""
        status = self._finish("commit_data", batch, (number, size, checksum, ref, key), f"data batch {number}")
        if status == "unknown":
            raise ReplayError(f"data batch {number} was never leased")
        return status == "ok"

    def _finish(self, name: str, batch: Pipeline, args: tuple[str | int, ...], what: str) -> str:
        self._scripts.queue(name, batch, *args)
        with surfaced(self._client):
            reply = self._checked(self._scripts.finish(name, batch))
        if reply[0] == "no_payload":
            raise PayloadMissing(f"{what}: its payload did not reach the store; commit again")
        if reply[0] == "budget":
            raise budget_error(*reply[1:])
        return str(reply[0])

    def fail(self, lease: Lease, reason: str) -> str:
        """'pool', 'dead' or 'lost'."""
        return str(self._run_script("fail", lease.group, lease.token, reason)[0])

    def release(self, owner: str) -> tuple[int, int]:
        _, groups, data = self._run_script("release", owner)
        return groups, data

    def lease_data(self, token: str, owner: str) -> int | None:
        reply = self._run_script("lease_data", token, owner)
        if reply[0] == "no_data":
            raise ReplayError("data_per_step is 0: this run takes no data batches")
        return int(reply[1]) if reply[0] == "ok" else None

    def rollback(self, step: int, groups: Sequence[int], data: Sequence[int], token: str) -> int:
        reply = self._run_script("rollback", step, _ids(groups), _ids(data), token)
        if reply[0] == "settled":
            raise OutOfOrder(
                f"cannot go back to step {step}: the ledger is settled through step {reply[1]} "
                f"and those groups are gone; resume from the checkpoint of step {reply[1]} or newer, "
                f"or start a new run"
            )
        if reply[0] == "conflict":
            raise CheckpointConflict(f"{reply[1]}: this checkpoint does not belong to this ledger")
        return int(reply[1])

    def claim(self, step: int, epoch: int) -> tuple[Claim | None, int]:
        """(the claim or None while it is not ready, references waiting in the trash)."""
        reply = self._run_script("claim", step, epoch)
        if reply[0] == "wait":
            return None, int(reply[1])
        if reply[0] == "fenced":
            raise Fenced(epoch, reply[1])
        if reply[0] == "settled":
            raise OutOfOrder(f"step {step} is settled (through step {reply[1]}): its claim is gone")
        if reply[0] == "order":
            raise OutOfOrder(f"step {step} was claimed but the next new claim is step {reply[1]}")
        _, group_part, data_part = reply
        if None in group_part or None in data_part:
            raise ReplayError(f"claim of step {step} names groups whose records are gone: the ledger is damaged")
        groups = [ClaimedGroup(int(g), GroupHeader.from_json(header.decode()), ref.decode()) for g, header, ref in _triples(group_part)]
        data = [ClaimedData(int(k), ref.decode(), checksum.decode()) for k, checksum, ref in _triples(data_part)]
        return Claim(step, epoch, groups, data), 0

    def publish(self, step: int, epoch: int) -> None:
        reply = self._run_script("publish", step, epoch)
        if reply[0] == "fenced":
            raise Fenced(epoch, reply[1])
        if reply[0] == "order":
            raise OutOfOrder(f"version {step} was published but claims only reach step {reply[1]}")

    def settle(self, step: int, epoch: int | None) -> None:
        reply = self._run_script("settle", step, "" if epoch is None else epoch)
        if reply[0] == "fenced":
            raise Fenced(-1 if epoch is None else epoch, reply[1])
        if reply[0] == "order":
            raise OutOfOrder(f"step {step} was settled but claims only reach step {reply[1]}")

    def counts(self) -> dict[str, int]:
        reply = self._run_script("counts")
        return dict(zip(reply[1::2], reply[2::2], strict=True))

    def last_failure(self) -> str:
        with surfaced(self._client):
            found: Any = self._client.hget(self.prefix + "meta", "last_failure")
        return found.decode() if found else ""

    def dead_letters(self) -> list[tuple[int, str]]:
        """(group, reason) of the latest 1000 dead groups, newest first."""
        with surfaced(self._client):
            lines: Any = self._client.lrange(self.prefix + "dead_letters", 0, -1)
        pairs = [line.decode().split(" ", 1) for line in lines]
        return [(int(group), reason) for group, reason in pairs]

    def trash(self) -> list[str]:
        with surfaced(self._client):
            found: Any = self._client.smembers(self.prefix + "trash")
        return sorted(ref.decode() for ref in found)

    def forget_trash(self, refs: Collection[str]) -> None:
        with surfaced(self._client):
            self._client.srem(self.prefix + "trash", *refs)

    def references(self) -> set[str]:
        """Every payload reference of a live or claimed record."""
        snapshot = self.snapshot()
        groups = set(snapshot.ready)
        data = set(snapshot.data_live)
        for claimed_groups, claimed_data in snapshot.claims.values():
            groups.update(claimed_groups)
            data.update(claimed_data)
        batch = self.batch()
        for group in groups:
            batch.hget(f"{self.prefix}group:{group}", "ref")
        for number in data:
            batch.hget(f"{self.prefix}data:{number}", "ref")
        with surfaced(self._client):
            return {ref.decode() for ref in batch.execute() if ref}

    def flag(self, name: str, value: int | None = None) -> bool:
        """Read the flag `name`, or set (1) or clear (0) it first."""
        with surfaced(self._client):
            if value is not None:
                self._client.hset(self.prefix + "meta", name, value)
            return self._client.hget(self.prefix + "meta", name) == b"1"

    def snapshot(self) -> Snapshot:
        p = self.prefix
        with surfaced(self._client):
            steps: Any = self._client.zrange(p + "claims", 0, -1)
            batch = self._client.pipeline(transaction=True)
            batch.hgetall(p + "meta")
            for name in ("live", "ready", "leases", "pool", "data_live", "claims"):
                batch.zrange(p + name, 0, -1)
            for name in ("settled", "evicted", "dead"):
                batch.get(p + name)
            for step in steps:
                batch.hmget(f"{p}claim:{int(step)}", "groups", "data")
            replies: list[Any] = batch.execute()
        meta, live, ready, leases, pool, data_live, now_steps = replies[:7]
        if list(now_steps) != list(steps):  # a claim or settle slipped in between the two reads
            return self.snapshot()
        return Snapshot(
            meta={key.decode(): int(value) for key, value in meta.items() if value.lstrip(b"-").isdigit()},
            live=_numbers(live),
            ready=_numbers(ready),
            leases=_numbers(leases),
            pool=_numbers(pool),
            claims={int(step): (_parsed(groups), _parsed(data)) for step, (groups, data) in zip(steps, replies[10:], strict=True)},
            finished={name: _bits(bitmap) for name, bitmap in zip(("settled", "evicted", "dead"), replies[7:10], strict=True)},
            data_live=_numbers(data_live),
        )


def _ids(numbers: Sequence[int]) -> str:
    return " ".join(str(int(number)) for number in numbers)


def _triples(flat: list[Any]) -> list[tuple[Any, Any, Any]]:
    return list(zip(flat[0::3], flat[1::3], flat[2::3], strict=True))


def _numbers(members: list[bytes]) -> frozenset[int]:
    return frozenset(int(member) for member in members)


def _parsed(text: bytes | None) -> tuple[int, ...]:
    return tuple(int(part) for part in (text or b"").split())


def _bits(bitmap: bytes | None) -> frozenset[int]:
    """Indices of the set bits; Redis counts from the most significant bit of the first byte."""
    return frozenset(8 * place + bit for place, byte in enumerate(bitmap or b"") if byte for bit in range(8) if byte & (0x80 >> bit))
