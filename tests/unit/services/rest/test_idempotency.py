"""The in-memory store of answers: ownership, age, bytes, and what a failure leaves."""

from __future__ import annotations

import asyncio

import pytest

from services.errors import ProblemError
from services.rest.idempotency import Answer, Kept, MemoryIdempotency, once

ANSWER = Kept(b"x" * 40, "application/json")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def kept(store: MemoryIdempotency, key: str, fingerprint: str = "f", owner: str = "o") -> Kept | None:
    """What is kept under a key; a new key is given up again."""
    found = await store.begin(owner, key, fingerprint)
    if found is None:
        await store.abandon(owner, key, fingerprint)
    return found


async def keep(store: MemoryIdempotency, key: str, answer: Kept = ANSWER, complete: bool = True) -> tuple[Kept, bool]:
    async def work() -> Answer:
        return Answer(answer, complete)

    return await once(store, "o", key, "f", work)


def test_an_answer_is_given_again_to_its_owner_for_its_request() -> None:
    async def story() -> None:
        store = MemoryIdempotency(10, 1000)
        assert await keep(store, "k") == (ANSWER, False)
        assert await keep(store, "k") == (ANSWER, True)
        assert await kept(store, "k", owner="other") is None
        with pytest.raises(ProblemError, match="another request"):
            await store.begin("o", "k", "g")

    asyncio.run(story())


def test_answers_age_and_make_room() -> None:
    async def story() -> None:
        clock = Clock()
        store = MemoryIdempotency(10, 100, clock)
        await keep(store, "a")
        clock.now = 5
        await keep(store, "b")
        await keep(store, "c")  # 120 bytes: the oldest goes
        assert [await kept(store, k) is not None for k in "abc"] == [False, True, True]
        clock.now = 15
        assert [await kept(store, k) is not None for k in "abc"] == [False, False, False]
        await keep(store, "large", Kept(b"x" * 101, "t"))
        assert await kept(store, "large") is None
        assert store._bytes == 0

    asyncio.run(story())


def test_only_complete_answers_are_kept_and_failures_free_the_key() -> None:
    async def story() -> None:
        store = MemoryIdempotency(10, 1000)
        assert await keep(store, "k", complete=False) == (ANSWER, False)
        assert await kept(store, "k") is None

        async def fail() -> Answer:
            raise ProblemError(503, "queue_full", "full")

        with pytest.raises(ProblemError):
            await once(store, "o", "k", "f", fail)

        async def hang() -> Answer:
            await asyncio.sleep(60)
            return Answer(ANSWER, True)

        task = asyncio.create_task(once(store, "o", "k", "f", hang))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        with pytest.raises(ProblemError) as running:
            await store.begin("o", "k", "f")
        assert (running.value.status, running.value.code) == (409, "idempotency_in_progress")
        with pytest.raises(ProblemError) as other:
            await store.begin("o", "k", "g")
        assert other.value.status == 422
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert await kept(store, "k") is None

    asyncio.run(story())
