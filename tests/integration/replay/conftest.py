"""A real embedded server per binary (PATH's and the wheel's), one fresh run name per test."""

import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import redis

from replay.buffer import BufferSettings, Lease, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from tests.integration.replay.binaries import BINARIES, name_of

RUNS = itertools.count()


@pytest.fixture(scope="session", params=BINARIES, ids=name_of)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    # In memory where possible: on a busy disk a due sync delays every write by up to 2 s. Durability has its
    # own tests.
    memory = Path("/dev/shm")
    folder = Path(mkdtemp(dir=memory)) if os.access(memory, os.W_OK) else tmp_path_factory.mktemp("redis")
    with EmbeddedRedis.start(folder, server=request.param) as running:
        yield running
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def client(server: EmbeddedRedis) -> redis.Redis:
    return connect(server.url)


class Driver:
    """A buffer with the short moves tests are made of."""

    def __init__(self, client: redis.Redis, run: str, settings: BufferSettings, payloads: Any = None) -> None:
        self.client = client
        self.run = run
        self.buffer = ReplayBuffer(client, run, settings, payloads)
        self.buffer.initialise()

    def again(self) -> "Driver":
        """What another process would build."""
        return Driver(self.client, self.run, self.buffer.settings)

    def lease(self, owner: str = "a") -> Lease | None:
        return self.buffer.lease(owner, 0)

    def take(self, owner: str = "a") -> Lease:
        lease = self.lease(owner)
        assert lease is not None, self.buffer.counts()
        return lease

    def commit(self, lease: Lease, version: int, **more: Any) -> bool:
        return self.buffer.commit(lease, f"group {lease.group}".encode(), [1.0, 2.0], version, {}, **more)

    def make(self, count: int, version: int) -> list[int]:
        """Lease, then commit, `count` groups sampled by `version`."""
        leases = [self.take() for _ in range(count)]
        assert all(self.commit(lease, version) for lease in leases)
        return [lease.group for lease in leases]

    def claim(self, step: int, epoch: int) -> list[int]:
        claim = self.buffer.claim(step, epoch, 0)
        for group in claim.groups:
            assert self.buffer.fetch(group) == f"group {group.group}".encode()
        return [group.group for group in claim.groups]

    def step(self, step: int, epoch: int) -> list[int]:
        """One whole learner step on freshly made groups; returns the claim."""
        self.make(self.buffer.settings.groups_per_step, step - 1)
        claimed = self.claim(step, epoch)
        self.buffer.publish(step, epoch)
        return claimed

    def expire(self, lease: Lease) -> None:
        """As if the lease's deadline had passed."""
        moved = self.client.zadd(f"ddrl:{{{self.run}}}:leases", {str(lease.group): 1}, xx=True, ch=True)
        assert moved == 1

    def state(self) -> dict[str, int]:
        """The counts without the ages."""
        return {name: value for name, value in self.buffer.counts().items() if not name.endswith("_ms")}

    def count(self, name: str) -> int:
        return self.buffer.counts()[name]


@pytest.fixture
def make_driver(client: redis.Redis) -> Iterator[Callable[..., Driver]]:
    """`make_driver(groups_per_step=…, …)`; every ledger made this way must pass its audit in the end."""
    made: list[Driver] = []

    def build(payloads: Any = None, **settings: Any) -> Driver:
        driver = Driver(client, f"run{next(RUNS)}", BufferSettings(**settings), payloads)
        made.append(driver)
        return driver

    yield build
    for driver in made:
        assert driver.buffer.audit() == []


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def eventually() -> Callable[[Callable[[], bool], float], None]:
    return wait_until
