"""Dead groups of this start, on a real ledger."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from trainer.run.deaths import Deaths


@pytest.fixture
def buffer(tmp_path: Path) -> Iterator[ReplayBuffer]:
    with EmbeddedRedis.start(tmp_path / "redis") as server:
        made = ReplayBuffer(connect(server.url), "run", BufferSettings(groups_per_step=4, max_attempts=1))
        made.initialise()
        made.rollback(0)
        yield made


def kill(buffer: ReplayBuffer, *reasons: str) -> None:
    for reason in reasons:
        lease = buffer.lease("generator-0", 5.0)
        assert lease is not None
        buffer.fail(lease, reason)


def test_groups_that_died_before_this_start_do_not_count(buffer: ReplayBuffer) -> None:
    """A run that gave up because of them can be mended and resumed."""
    kill(buffer, "old 1", "old 2")
    deaths = Deaths(buffer)
    assert (deaths.look(), deaths.count, deaths.first) == (False, 0, "")
    kill(buffer, "scoring: a", "scoring: b")
    assert deaths.look()
    assert (deaths.count, deaths.first) == (2, "scoring: a")
    assert not deaths.look()
    kill(buffer, "sampling: c")
    assert (deaths.look(), deaths.count, deaths.first) == (True, 3, "scoring: a")
