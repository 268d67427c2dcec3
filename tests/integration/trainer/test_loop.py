"""When a rank begins, waits and stops: what the buffer tells it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from replay.errors import ClaimTimeout
from tests.gloo import alone
from trainer.learn.loop import await_start, next_claim

CPU = torch.device("cpu")


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


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this rank only."""
    with alone():
        yield


@pytest.mark.usefixtures("group")
def test_a_learner_that_waits_for_groups_stops_when_it_is_told(buffer: ReplayBuffer) -> None:
    """Without this, a starved learner outlasts the deadline of a stop and leaves no checkpoint."""
    epoch = buffer.rollback(0)
    stop = threading.Timer(0.3, buffer.request_stop)
    stop.start()
    assert next_claim(buffer, 1, epoch, 60.0, 0, CPU) is None
    stop.join()


@pytest.mark.usefixtures("group")
def test_groups_that_come_late_are_claimed_and_none_at_all_is_an_error(buffer: ReplayBuffer) -> None:
    epoch = buffer.rollback(0)
    with pytest.raises(ClaimTimeout, match="step 1"):
        next_claim(buffer, 1, epoch, 0.1, 0, CPU)
    lease = buffer.lease("a", 0)
    assert lease is not None
    made = threading.Timer(2.5, buffer.commit, (lease, b"x", [0.0, 1.0], 0))  # in the second slice
    made.start()
    claim = next_claim(buffer, 1, epoch, 60.0, 0, CPU)
    assert claim is not None
    assert [group.group for group in claim.groups] == [lease.group]
    made.join()


@pytest.mark.usefixtures("group")
def test_weights_that_went_missing_are_handed_in_again_while_groups_are_waited_for(buffer: ReplayBuffer) -> None:
    """A store of objects that was killed has none; a generator that starts now could wait for ever, and the learner for it."""
    epoch = buffer.rollback(0)
    looks, published = [True, False, True], []
    lease = buffer.lease("a", 0)
    assert lease is not None
    made = threading.Timer(5.0, buffer.commit, (lease, b"x", [0.0, 1.0], 0))
    made.start()
    claim = next_claim(buffer, 1, epoch, 60.0, 0, CPU, lambda: looks.pop(0) if looks else True, lambda: published.append(1))
    assert claim is not None
    assert published == [1]
    made.join()
