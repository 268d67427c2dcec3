"""Tasks end although a cancellation was lost on the way."""

from __future__ import annotations

import asyncio

import pytest

from services.jobs import tasks
from services.jobs.store import RedisIdempotency
from services.jobs.tasks import ended


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "AGAIN_S", 0.05)


async def deaf(cancellations: int) -> None:
    """Loses as many, as a command does whose bytes are out in the turn in which it is cancelled."""
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancellations -= 1
            if cancellations < 0:
                raise


def test_a_lost_cancellation_is_made_again() -> None:
    async def body() -> None:
        async with asyncio.timeout(5):
            loop = asyncio.get_running_loop()
            several = [loop.create_task(deaf(n)) for n in (0, 1, 3)]
            await asyncio.sleep(0)
            await ended(*several)
            assert all(task.cancelled() for task in several)

    asyncio.run(body())


def test_who_never_ends_is_left_and_named(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks, "ATTEMPTS", 2)

    async def body() -> None:
        task = asyncio.get_running_loop().create_task(deaf(3), name="the deaf one")
        await asyncio.sleep(0)
        await ended(task)
        assert not task.done()
        await ended(task)
        assert task.done()

    asyncio.run(body())
    assert "the deaf one does not end" in caplog.text


def test_an_error_of_a_task_is_nobodys() -> None:
    async def failing() -> None:
        raise ValueError("lost")

    async def body() -> None:
        await ended(asyncio.get_running_loop().create_task(failing()))
        await ended()

    asyncio.run(body())


def test_a_store_closes_whose_renewal_missed_its_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The renewal is in a command when the store closes, and the command ends in that turn."""
    monkeypatch.setattr(RedisIdempotency, "LEASE_S", 0.03)

    async def body() -> None:
        store = RedisIdempotency("redis://127.0.0.1:1/0", 60, 1000)
        sending, sent = asyncio.Event(), asyncio.get_running_loop().create_future()

        async def run(script: str, *args: object) -> list[bytes]:
            if script == "idempotency_begin":
                return [b"new"]
            sending.set()
            try:
                await asyncio.wait([sent])
            except asyncio.CancelledError:
                if sent.done():
                    raise
                sent.set_result(None)
            return []

        monkeypatch.setattr(store._redis, "run", run)
        assert await store.begin("a", "k", "f") is None
        async with asyncio.timeout(5):
            await sending.wait()
            await store.close()

    asyncio.run(body())
