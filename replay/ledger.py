"""The ledger of one run in Redis: each method is one script call, each reply a typed value or a typed error.

Lifecycle of a group: leased → ready → claimed(step) → settled, or evicted(reason) / dead(reason). Invariant:
every index below `next_group` is in exactly one of these states, whatever process dies between two calls. The
rules themselves are in `replay/lua/`; payload bytes are the façade's business (`replay.buffer`).
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import redis
from redis.client import Pipeline

from replay import limits
from replay.audit import Snapshot
from replay.connect import surfaced
from replay.errors import CheckpointConflict, Fenced, InUse, NotInitialised, OutOfOrder, ReplayError
from replay.keys import key_prefix, own_keys
from replay.policy import BufferSettings, budget_error
from replay.records import Claim, ClaimedData, ClaimedGroup, DeadLetter, GroupHeader, Lease
from replay.replies import bits, numbers, rows
from replay.rewards import identity
from replay.scripts import Scripts

StoredPart = tuple[str, int]
"""A part of a payload in Redis: its key and its size."""


@dataclass(frozen=True)
class Answer:
    """What the ledger says to a commit: 'ok', 'dropped', 'lost', 'duplicate', or 'full' / 'unstored': ask again.

    While 'full', `groups` ready or claimed groups and the data batches hold `held` of `limit` bytes.
    """

    status: str
    held: int = 0
    groups: int = 0
    limit: int = 0


class Ledger:
    """Script calls for one run."""

    def __init__(self, client: redis.Redis, run: str) -> None:
        self.prefix = key_prefix(run)
        self._client = client
        self._run = run
        self._scripts = Scripts(client, self.prefix)

    def initialise(self, settings: BufferSettings, place: str) -> None:
        """See `limits.write`."""
        with surfaced(self._client):
            limits.write(self._client, self._run, self.prefix + "meta", settings, place)

    def settings(self) -> tuple[BufferSettings, str]:
        """See `limits.read`."""
        with surfaced(self._client):
            return limits.read(self._client, self._run, self.prefix + "meta")

    def _run_script(self, name: str, *args: str | int) -> list[Any]:
        with surfaced(self._client):
            reply = self._scripts.run(name, *args)
        return self._checked(reply)

    def _checked(self, reply: list[Any]) -> list[Any]:
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

    def commit(self, lease: Lease, header: GroupHeader, flat: bool, ref: str, parts: Sequence[StoredPart], lineage: int | None, batch: Pipeline) -> Answer:
        """Sends `batch` (which holds the writes of `parts`, none outside Redis) with the ledger entry behind it."""
        origin = "" if lineage is None else lineage
        head = (lease.group, lease.token, header.version, origin, header.bytes, header.to_json())
        return self._finish("commit", batch, (*head, ref, int(flat), identity(header.revisions), *_flat(parts)))

    def commit_data(self, number: int, size: int, checksum: str, ref: str, parts: Sequence[StoredPart], batch: Pipeline) -> Answer:
        """As `commit`; 'duplicate': another copy of this batch is already there."""
        answer = self._finish("commit_data", batch, (number, size, checksum, ref, *_flat(parts)))
        if answer.status == "unknown":
            raise ReplayError(f"data batch {number} was never leased")
        return answer

    def _finish(self, name: str, batch: Pipeline, args: tuple[str | int, ...]) -> Answer:
        with surfaced(self._client):
            reply = self._checked(self._scripts.finish(name, batch, *args))
        if reply[0] == "budget":
            raise budget_error(*reply[1:])
        if reply[0] == "full":
            return Answer("full", *reply[1:])
        return Answer("unstored" if reply[0] in ("no_payload", "no_memory") else str(reply[0]))

    def fail(self, lease: Lease, reason: str, prompt: str) -> None:
        self._run_script("fail", lease.group, lease.token, reason, prompt)

    def give_back(self, lease: Lease, reason: str) -> None:
        self._run_script("give_back", lease.group, lease.token, reason)

    def release(self, owner: str) -> tuple[int, int]:
        _, groups, data = self._run_script("release", owner)
        return groups, data

    def lease_data(self, token: str, owner: str) -> int | None:
        reply = self._run_script("lease_data", token, owner)
        if reply[0] == "no_data":
            raise ReplayError("data_per_step is 0: this run takes no data batches")
        return int(reply[1]) if reply[0] == "ok" else None

    def expect(self, revisions: str) -> int:
        """How many ready groups were scored otherwise and are evicted."""
        return int(self._run_script("expect", revisions)[1])

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
        _, group_part, data_part, claimed_at = reply
        if None in group_part or None in data_part:
            raise ReplayError(f"claim of step {step} names groups whose records are gone: the ledger is damaged")
        groups = [
            ClaimedGroup(int(g), GroupHeader.from_json(header.decode()), ref.decode(), int(leased_at), int(ready_at))
            for g, header, ref, leased_at, ready_at in rows(group_part, 5)
        ]
        data = [ClaimedData(int(k), ref.decode(), checksum.decode()) for k, checksum, ref in rows(data_part, 3)]
        return Claim(step, epoch, groups, data, claimed_at), 0

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

    def dead_letters(self) -> list[DeadLetter]:
        """Of the latest 1000 dead groups, newest first."""
        batch = self._client.pipeline(transaction=True)
        batch.lrange(self.prefix + "dead_order", 0, -1)
        batch.hgetall(self.prefix + "letters")
        batch.hgetall(self.prefix + "deaths")
        with surfaced(self._client):
            order, letters, deaths = batch.execute()
        found = []
        for group in order:
            number, epoch, died_at, prompt = deaths.get(group, b"0 0 0 ").decode().split(" ", 3)
            found.append(DeadLetter(int(group), letters[group].decode().splitlines(), int(number), int(epoch), int(died_at), prompt))
        return found

    def requeue(self, group: int) -> bool:
        """False: the group is not dead."""
        return bool(self._run_script("requeue", group)[0] == "ok")

    def close(self, force: bool) -> None:
        """Every later call raises `NotInitialised`; raises `InUse` while leases are alive, unless forced."""
        try:
            reply = self._run_script("close", int(force))
        except NotInitialised:  # closed before
            return
        if reply[0] == "leases":
            raise InUse(f"run {self._run!r} is in use: {reply[1]} groups and {reply[2]} data batches are leased; stop it, or force")

    def erase(self) -> int:
        """Delete every key of the run, the record of its limits last; returns their number."""
        meta = self.prefix + "meta"
        with surfaced(self._client):
            erased = sum(int(self._client.unlink(key)) for key in own_keys(self._client, self.prefix) if key != meta)
            return erased + int(self._client.unlink(meta))

    def trash(self) -> list[str]:
        with surfaced(self._client):
            found: Any = self._client.smembers(self.prefix + "trash")
        return sorted(ref.decode() for ref in found)

    def forget_trash(self, refs: Collection[str]) -> None:
        with surfaced(self._client):
            self._client.srem(self.prefix + "trash", *refs)

    def flag(self, name: str, value: int | None = None) -> bool:
        """Read the flag `name`, or set (1) or clear (0) it first."""
        with surfaced(self._client):
            if value is not None:
                self._client.hset(self.prefix + "meta", name, value)
            return self._client.hget(self.prefix + "meta", name) == b"1"

    def snapshot(self) -> Snapshot:
        _, meta, sets, bitmaps, claims, groups, data, trash = self._run_script("snapshot")
        live, ready, leases, pool, requeued, data_live = (frozenset(int(member) for member in members) for members in sets)
        return Snapshot(
            meta={name.decode(): int(value) for name, value in rows(meta, 2) if value.lstrip(b"-").isdigit()},
            live=live,
            ready=ready,
            leases=leases,
            pool=pool,
            claims={int(step): (numbers(taken), numbers(batches)) for step, taken, batches in rows(claims, 3)},
            finished={name: bits(bitmap) for name, bitmap in zip(("settled", "evicted", "dead"), bitmaps, strict=True)},
            data_live=data_live,
            requeued=requeued,
            group_bytes={int(group): int(size) for group, size, ref, _ in rows(groups, 4) if ref},
            data_bytes={int(number): int(size) for number, size, ref, _ in rows(data, 4) if ref},
            revisions={int(group): text.decode() for group, _, ref, text in rows(groups, 4) if ref},
            expected=dict(rows(meta, 2)).get(b"revisions", b"").decode(),
            references=frozenset(ref.decode() for _, _, ref, _ in rows(groups, 4) + rows(data, 4) if ref),
            trash=frozenset(ref.decode() for ref in trash),
        )


def _flat(parts: Sequence[StoredPart]) -> list[str | int]:
    return [field for part in parts for field in part]


def _ids(numbers: Sequence[int]) -> str:
    return " ".join(str(int(number)) for number in numbers)
