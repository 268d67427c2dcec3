"""Ranks come up while the reward fleet does, and begin when the driver says so."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from trainer.learn.loop import await_start


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[ReplayBuffer]:
    with EmbeddedRedis.start(tmp_path) as server:
        buffer = ReplayBuffer(connect(server.url), "start", BufferSettings(groups_per_step=1))
        buffer.initialise()
        yield buffer


def test_ranks_begin_when_the_driver_allows_it(buffer: ReplayBuffer) -> None:
    rank = threading.Thread(target=await_start, args=(buffer, 20.0))
    rank.start()
    rank.join(0.5)
    assert rank.is_alive()
    buffer.allow_start()
    rank.join(5)
    assert not rank.is_alive()
    await_start(buffer, 0)  # a rank that starts again later
    buffer.allow_start(False)  # another start of the run
    with pytest.raises(TimeoutError, match="did not let training start"):
        await_start(buffer, 0)


def test_a_run_that_is_stopped_before_it_began_waits_no_longer(buffer: ReplayBuffer) -> None:
    buffer.request_stop()
    await_start(buffer, 0)
