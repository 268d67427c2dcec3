"""A Redis user that may touch one run's keys only, with the commands replay/README.md lists."""

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import redis
from redis.exceptions import NoPermissionError

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from replay.errors import ReplayError

README = Path(__file__).resolve().parents[3] / "replay" / "README.md"


@pytest.fixture
def limited(server: EmbeddedRedis, client: redis.Redis) -> Callable[[str], str]:
    """`limited(run)`: URL of the user that the README's ACL line makes for `run`."""

    def make(run: str) -> str:
        line = re.search(r"^ACL SETUSER (?:.*\\\n)*.*", README.read_text(), re.MULTILINE)
        assert line is not None
        words = line.group().replace("\\\n", " ").replace("RUN", run).replace("PASSWORD", "pw").split()
        client.execute_command(*words)
        parts = urlsplit(server.url)
        return f"redis://{words[2]}:pw@{parts.hostname}:{parts.port}/0"

    return make


def test_a_limited_user_can_run_everything(limited: Callable[[str], str], caplog: pytest.LogCaptureFixture) -> None:
    settings = BufferSettings(groups_per_step=2, data_per_step=1, max_attempts=1, drop_zero_variance=True)
    url = limited("acl")
    buffer = ReplayBuffer(connect(url), "acl", settings)
    with caplog.at_level(logging.WARNING, "replay.limits"):
        buffer.initialise()
    assert "Redis refuses INFO" in caplog.text
    assert "version, memory and cluster mode stay unchecked" in caplog.text
    assert "maxmemory, maxmemory-policy and appendonly stay unchecked" in caplog.text
    epoch = buffer.rollback(0)

    def take() -> Any:
        lease = buffer.lease("a", 0)
        assert lease is not None
        return lease

    buffer.fail(take(), "x")
    assert [(letter.group, letter.reasons) for letter in buffer.dead_letters()] == [(0, ["x"])]
    assert buffer.requeue(0)
    assert buffer.commit(take(), b"flat", [1.0, 1.0], 0)
    for number in (1, 2):
        lease = take()
        assert lease.group == number
        assert buffer.extend(lease)
        assert buffer.commit(lease, b"payload", [1.0, 2.0], 0)
    assert buffer.release("a") == (0, 0)
    assert buffer.lease_data("f", 0) == 0
    buffer.commit_data(0, b"data")
    claim = buffer.claim(1, epoch, 0)
    assert [buffer.fetch(item) for item in claim.groups] == [b"payload"] * 2
    buffer.publish(1, epoch)
    buffer.request_stop()
    assert buffer.stop_requested()
    buffer.settle(1)
    epoch = buffer.rollback(1)
    assert buffer.audit() == []
    assert buffer.counts()["settled"] == 2
    assert ReplayBuffer.attach(connect(url), "acl").settings.groups_per_step == 2
    assert buffer.trim() == {"trash": 0, "orphans": 0}
    assert buffer.forget() > 3


def test_a_limited_user_reaches_no_other_run(limited: Callable[[str], str], client: redis.Redis) -> None:
    ReplayBuffer(client, "other", BufferSettings(groups_per_step=1)).initialise()
    intruder = connect(limited("mine"))
    with pytest.raises(ReplayError, match="Redis refused"):
        ReplayBuffer(intruder, "other", BufferSettings(groups_per_step=1)).counts()
    with pytest.raises(NoPermissionError):
        intruder.execute_command("FLUSHALL")
