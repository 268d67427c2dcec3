"""Handing a payload in: bytes first, then the ledger entry, small ones in one round trip; while there is no room, only the question.

Invariant: the ledger never adopts bytes that are not there, and bytes it refuses are deleted. Whatever dies in between
leaves bytes that expire or are swept.
"""

from collections.abc import Callable

from redis.client import Pipeline

from replay.errors import BudgetExceeded, PayloadMissing, ReplayError
from replay.layout import Packed
from replay.ledger import Answer, StoredPart
from replay.payloads import PayloadStore
from replay.policy import room_error
from replay.waiting import poll

Tell = Callable[[str, list[StoredPart], Pipeline], Answer]
"""Sends the batch with the ledger entry for (reference, its parts in Redis) behind it."""


def hand_in(store: PayloadStore, what: str, name: str, payload: Packed, new_batch: Callable[[], Pipeline], tell: Tell, timeout_s: float) -> str:
    """Store `payload` under `name` and tell the ledger; waits up to `timeout_s` for room.

    Returns the ledger's answer; unless it is 'ok', the payload is deleted. Raises `BudgetExceeded`, `ReplayError`.
    """
    ref, answer = "", Answer("unstored")

    def attempt() -> Answer | None:
        nonlocal ref, answer
        batch = new_batch()
        if answer.status != "unstored":
            try:
                store.refresh(ref, batch)
            except PayloadMissing:
                answer = Answer("unstored")
        if answer.status == "unstored":
            ref = store.write(name, payload.parts, batch)
        stored = list(zip(store.redis_keys(ref), payload.layout.part_sizes, strict=False))  # no keys outside Redis
        answer = tell(ref, stored, batch)
        return None if answer.status in ("full", "unstored") else answer

    try:
        poll(attempt, timeout_s)
    except BudgetExceeded:
        store.delete([ref])
        raise
    # After any other error nobody knows whether the ledger adopted the payload; if not, it expires or is swept.
    if answer.status != "ok":
        store.delete([ref])
    if answer.status == "full":
        raise room_error(what, payload.bytes, answer.held, answer.groups, answer.limit, timeout_s)
    if answer.status == "unstored":
        raise ReplayError(f"{what}: Redis is at its maxmemory and did not store {payload.bytes} bytes within {timeout_s:.0f} s; raise maxmemory")
    return answer.status
