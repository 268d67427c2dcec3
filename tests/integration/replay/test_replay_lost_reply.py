"""A reply that never arrives: the command ran, the client asks again, and nothing happens twice."""

from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest
from redis.backoff import NoBackoff

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from tests.integration.replay.proxy import DroppingProxy


@pytest.fixture
def proxy(server: EmbeddedRedis) -> Iterator[DroppingProxy]:
    parts = urlsplit(server.url)
    running = DroppingProxy(str(parts.hostname), int(parts.port or 0))
    yield running
    running.close()


def test_every_operation_with_its_reply_lost(
    server: EmbeddedRedis, proxy: DroppingProxy, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("replay.connect.ExponentialWithJitterBackoff", lambda **_: NoBackoff())  # the pauses are not what is tried
    parts = urlsplit(server.url)
    run = f"lost-{request.node.callspec.id}"
    settings = BufferSettings(groups_per_step=2, data_per_step=1, checkpoint_interval=2)
    buffer = ReplayBuffer(connect(server.url.replace(f":{parts.port}/", f":{proxy.port}/")), run, settings)
    buffer.initialise()
    lost = 0

    def losing() -> None:
        nonlocal lost
        lost += 1
        proxy.drop = 1

    losing()
    assert buffer.expect_rewards({"ocr": "r1"}) == 0
    losing()
    epoch = buffer.rollback(0)
    assert epoch == 1
    for step in (1, 2):
        for _ in range(2):
            losing()
            lease = buffer.lease("a", 1)
            assert lease is not None
            losing()
            assert buffer.commit(lease, b"payload", [1.0], step - 1, revisions={"ocr": "r1"})
        losing()
        buffer.give_back(lease, "a group that is committed is not given back")
        losing()
        number = buffer.lease_data("f", 1)
        assert number == step - 1
        losing()
        buffer.commit_data(number, b"data")
        losing()
        claim = buffer.claim(step, epoch, 1)
        assert [item.group for item in claim.groups] == [2 * step - 2, 2 * step - 1]
        assert [buffer.fetch(item) for item in claim.groups] == [b"payload"] * 2
        losing()
        buffer.publish(step, epoch)
        losing()
        buffer.settle(step, epoch)
    assert proxy.dropped == lost
    counts = buffer.counts()
    assert (counts["settled"], counts["next_group"], counts["bytes"], counts["next_data"]) == (4, 4, 0, 2)
    assert buffer.audit() == []
