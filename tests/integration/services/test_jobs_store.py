"""The job store on a real Redis: every move between states, leases, bounds, what is left behind."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis

from replay.embedded import EmbeddedRedis
from services.errors import ProblemError
from services.jobs.config import JobsConfig
from services.jobs.store import JobConflict, JobsFull, JobStore, JobStoreError, RedisIdempotency
from services.rest.idempotency import Kept

LOST = b'{"code": "worker_lost"}'
NAMES = itertools.count()
Body = Callable[[Callable[..., JobStore]], Awaitable[None]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis.start(Path(tmp_path_factory.mktemp("redis"))) as running:
        yield running


@pytest.fixture
def run(server: EmbeddedRedis) -> Callable[[Body], None]:
    """Run a coroutine that is given a maker of stores on one prefix of its own."""
    prefix = f"test{next(NAMES)}:{{jobs}}:"

    async def with_stores(body: Body) -> None:
        made: list[JobStore] = []

        def make(**settings: float) -> JobStore:
            made.append(JobStore(server.url, JobsConfig.model_validate(settings), prefix))
            return made[-1]

        try:
            await body(make)
            assert (await made[0].counts())["bytes"] >= 0
        finally:
            for store in made:
                await store.close()

    return lambda body: asyncio.run(with_stores(body))


def test_a_job_from_submission_to_answer(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store, other = make(), make()
        job_id, new = await store.submit("score", {"content_type": "application/json"}, b"\x00body")
        assert new
        queued = await other.get(job_id)
        assert queued is not None
        assert (queued.state, queued.attempts, queued.answer) == ("queued", 0, None)
        claim = await other.claim(LOST)
        assert claim is not None
        assert (claim.id, claim.kind, claim.meta, claim.payload) == (job_id, "score", {"content_type": "application/json"}, b"\x00body")
        assert await store.claim(LOST) is None
        assert (await store.counts()) == {"queued": 0, "running": 1, "bytes": 5}
        assert await other.renew(claim)
        assert await other.finish(claim, "succeeded", b'{"results": []}')
        assert not await other.finish(claim, "failed", problem=b"{}"), "a job ends once"
        done = await store.get(job_id)
        assert done is not None
        assert (done.state, done.attempts, done.answer, done.problem) == ("succeeded", 1, b'{"results": []}', None)
        assert done.finished_at is not None
        assert (await store.counts()) == {"queued": 0, "running": 0, "bytes": 0}
        assert await store.get("0" * 32) is None

    run(body)


def test_first_come_first_served(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make()
        ids = []
        for i in range(5):
            ids.append((await store.submit("score", {}, bytes([i])))[0])
            await asyncio.sleep(0.002)  # Redis orders by its millisecond
        claims = [await store.claim(LOST) for _ in ids]
        assert [claim and claim.id for claim in claims] == ids

    run(body)


def test_a_silent_worker_loses_the_job_and_its_late_answer_changes_nothing(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make(lease_s=0.05, max_tries=2)
        job_id, _ = await store.submit("score", {}, b"x")
        first = await store.claim(LOST)
        assert first is not None
        await asyncio.sleep(0.08)
        second = await store.claim(LOST)
        assert second is not None
        assert (second.id, second.payload) == (job_id, b"x")
        assert second.token != first.token
        assert not await store.renew(first)
        assert not await store.finish(first, "succeeded", b"old")
        await asyncio.sleep(0.08)
        assert await store.claim(LOST) is None, "two lost workers end it"
        failed = await store.get(job_id)
        assert failed is not None
        assert (failed.state, failed.problem) == ("failed", LOST)

    run(body)


def test_released_jobs_come_back_after_their_delay(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make()
        await store.submit("score", {}, b"x")
        claim = await store.claim(LOST)
        assert claim is not None
        assert await store.release(claim, 0.1, counted=False)
        assert not await store.renew(claim)
        assert await store.claim(LOST) is None
        await asyncio.sleep(0.15)
        assert await store.claim(LOST) is not None

    run(body)


def test_cancelling(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make()
        waiting, _ = await store.submit("score", {}, b"x")
        assert await store.cancel(waiting)
        assert not await store.cancel(waiting)
        assert await store.claim(LOST) is None
        running, _ = await store.submit("score", {}, b"x")
        claim = await store.claim(LOST)
        assert claim is not None
        assert await store.cancel(running)
        assert not await store.renew(claim)
        assert not await store.finish(claim, "succeeded", b"{}")
        for job_id in (waiting, running):
            job = await store.get(job_id)
            assert job is not None
            assert (job.state, job.answer) == ("cancelled", None)
        assert not await store.cancel("unknown")
        assert (await store.counts()) == {"queued": 0, "running": 0, "bytes": 0}

    run(body)


def test_expiry_then_oblivion(run: Callable[[Body], None], server: EmbeddedRedis) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make(ttl_s=0.1, tombstone_s=0.2)
        waiting, _ = await store.submit("score", {}, b"x")
        held, _ = await store.submit("score", {}, b"y")
        answered, _ = await store.submit("score", {}, b"z")
        claims = {claim.id: claim for claim in [await store.claim(LOST) for _ in range(3)] if claim}
        await store.release(claims[waiting], 0, counted=True)
        await store.finish(claims[answered], "succeeded", b"{}")
        await asyncio.sleep(0.14)
        for job_id in (waiting, held, answered):
            job = await store.get(job_id)
            assert job is not None
            assert (job.state, job.answer) == ("expired", None)
        assert await store.claim(LOST) is None
        assert not await store.renew(claims[held])
        assert (await store.counts()) == {"queued": 0, "running": 0, "bytes": 0}
        await asyncio.sleep(0.25)
        assert [await store.get(job_id) for job_id in (waiting, held, answered)] == [None] * 3

    run(body)
    client = redis.Redis.from_url(server.url)
    left = {key for key in client.scan_iter("test*") if b":job:" in key or b":in:" in key or b":out:" in key}
    assert not [key for key in left if client.ttl(key) < 0], "everything about a job has a time to live"
    client.close()


def test_bounds(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make(max_unfinished=2, max_bytes=2000)
        first, _ = await store.submit("score", {}, b"a" * 1500)
        with pytest.raises(JobsFull, match="2000 bytes"):
            await store.submit("score", {}, b"b" * 600)
        await store.submit("score", {}, b"c" * 400)
        with pytest.raises(JobsFull, match="2 jobs have not ended"):
            await store.submit("score", {}, b"")
        await store.cancel(first)
        await store.submit("score", {}, b"d" * 600)

    run(body)


def test_idempotency_keys(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make(max_unfinished=1)
        job_id, _ = await store.submit("score", {"a": "b"}, b"x", ("key", "1"))
        assert await store.submit("score", {"a": "b"}, b"x", ("key", "1")) == (job_id, False), "a replay needs no room"
        with pytest.raises(JobConflict):
            await store.submit("score", {"a": "b"}, b"y", ("key", "2"))
        claim = await store.claim(LOST)
        assert claim is not None
        await store.finish(claim, "succeeded", b"{}")
        assert await store.submit("score", {"a": "b"}, b"x", ("key", "1")) == (job_id, False)
        assert (await store.submit("score", {"a": "b"}, b"x", ("another", "1")))[1]

    run(body)


def test_many_workers_share_the_jobs_without_loss_or_repetition(run: Callable[[Body], None]) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        stores = [make() for _ in range(4)]
        ids = [(await stores[i % 4].submit("score", {}, str(i).encode()))[0] for i in range(60)]
        seen: list[str] = []

        async def work(store: JobStore) -> None:
            while (claim := await store.claim(LOST)) is not None:
                seen.append(claim.id)
                assert await store.finish(claim, "succeeded", claim.payload)

        await asyncio.gather(*map(work, stores))
        assert sorted(seen) == sorted(ids)
        for i, job_id in enumerate(ids):
            job = await stores[0].get(job_id)
            assert job is not None
            assert job.answer == str(i).encode()

    run(body)


def test_commands_sent_again_after_a_lost_reply_change_nothing(run: Callable[[Body], None], monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., JobStore]) -> None:
        store = make()
        monkeypatch.setattr("services.jobs.store.secrets.token_hex", lambda size: f"{size:032x}")
        job_id, _ = await store.submit("score", {}, b"x")
        first, again = await store.claim(LOST), await store.claim(LOST)
        assert first is not None
        assert again is not None
        assert (again.id, again.token, again.payload) == (first.id, first.token, b"x"), "the same token gets the same job"
        assert await store.submit("score", {}, b"x") == (job_id, True)
        job = await store.get(job_id)
        assert job is not None
        assert (job.state, job.attempts) == ("running", 1), "it is not queued a second time"
        assert (await store.counts())["bytes"] == 1

    run(body)


def test_an_unreachable_server_is_named_without_its_password() -> None:
    async def body() -> None:
        store = JobStore("redis://:secret@127.0.0.1:1/0", JobsConfig())
        with pytest.raises(JobStoreError, match=r"127\.0\.0\.1:1") as error:
            await store.get("x")
        assert "secret" not in str(error.value)
        await store.close()

    asyncio.run(body())


def test_idempotency_keys_of_requests(server: EmbeddedRedis) -> None:
    async def body() -> None:
        one, two = (RedisIdempotency(server.url, 60, 1000, "test-idem{x}:") for _ in range(2))
        answer = Kept(b'{"a": 1}\x00', "application/json")
        assert await one.begin("alice", "k", "f1") is None
        for store in (one, two):
            with pytest.raises(ProblemError, match="being worked on"):
                await store.begin("alice", "k", "f1")
            with pytest.raises(ProblemError, match="another request"):
                await store.begin("alice", "k", "f2")
        assert await two.begin("bob", "k", "f2") is None, "keys belong to their owner"
        await one.finish("alice", "k", "f1", answer)
        assert await two.begin("alice", "k", "f1") == answer
        with pytest.raises(ProblemError, match="another request"):
            await two.begin("alice", "k", "f2")
        await two.abandon("bob", "k", "f2")
        assert await one.begin("bob", "k", "f3") is None, "an abandoned key is free"
        await one.finish("bob", "k", "f3", Kept(b"x" * 1001, "text/plain"))
        assert await one.begin("bob", "k", "f4") is None, "too large to keep"
        await one.close()
        await two.close()

    asyncio.run(body())


async def eventually_free(store: RedisIdempotency, owner: str, key: str, fingerprint: str) -> bool:
    """Whether the key is free within ten seconds; it is taken then."""
    for _ in range(200):
        try:
            return await store.begin(owner, key, fingerprint) is None
        except ProblemError:
            await asyncio.sleep(0.05)
    return False


def test_a_dead_process_frees_its_idempotency_keys_and_a_living_one_keeps_them(server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        monkeypatch.setattr(RedisIdempotency, "LEASE_S", 2.0)
        dead, alive, other = (RedisIdempotency(server.url, 60, 1000, "test-lease{x}:") for _ in range(3))
        assert await dead.begin("a", "dead", "f") is None
        assert await alive.begin("a", "alive", "f") is None
        await dead.close()  # as a kill would: nothing is abandoned
        assert await eventually_free(other, "a", "dead", "f")
        with pytest.raises(ProblemError, match="being worked on"):
            await other.begin("a", "alive", "f")
        await alive.close()
        await other.close()

    asyncio.run(body())


def test_without_redis_a_request_with_a_key_is_refused_and_an_answer_is_still_given() -> None:
    async def body() -> None:
        store = RedisIdempotency("redis://127.0.0.1:1/0", 60, 1000)
        with pytest.raises(ProblemError) as error:
            await store.begin("a", "k", "f")
        assert error.value.code == "idempotency_unavailable"
        await store.finish("a", "k", "f", Kept(b"", "text/plain"))
        await store.close()

    asyncio.run(body())
