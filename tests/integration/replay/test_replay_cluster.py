"""A real Redis Cluster: three masters, one replica. A run lives on one node, wherever the URL points."""

import random
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.errors import ClaimTimeout
from tests.integration.replay.binaries import BINARIES, name_of

Eventually = Callable[[Callable[[], bool], float], None]
SLOTS = 16384


def free_ports(count: int) -> list[int]:
    """Ports whose cluster bus port (10000 higher) is free too."""
    found: list[int] = []
    while len(found) < count:
        port = random.randint(20000, 32000)
        with socket.socket() as one, socket.socket() as bus:
            try:
                one.bind(("127.0.0.1", port))
                bus.bind(("127.0.0.1", port + 10000))
            except OSError:
                continue
        if port not in found:
            found.append(port)
    return found


class Cluster:
    """Four server processes; masters 0, 1, 2 share the slots, node 3 is a replica of node 1."""

    def __init__(self, binary: Path, folder: Path) -> None:
        self.ports = free_ports(4)
        self.processes: list[subprocess.Popen[bytes]] = []
        for port in self.ports:
            place = folder / str(port)
            place.mkdir()
            options = {
                "port": port, "bind": "127.0.0.1", "dir": place, "cluster-enabled": "yes", "cluster-node-timeout": 500,
                "appendonly": "yes", "save": "", "logfile": place / "log", "maxmemory-policy": "noeviction",
            }  # fmt: skip
            command = [str(binary), *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
            self.processes.append(subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL))
        self.clients = [redis.Redis(port=port, socket_timeout=10) for port in self.ports]

    def url(self, node: int) -> str:
        return f"redis://127.0.0.1:{self.ports[node]}/0"

    def tell(self, node: int, *words: Any) -> Any:
        return self.clients[node].execute_command("CLUSTER", *words)

    def join(self, eventually: Eventually) -> None:
        eventually(lambda: all(map(self.answers, range(4))), 20)
        for node, first in enumerate((0, 5461, 10923)):
            self.tell(node, "ADDSLOTS", *range(first, (5461, 10923, SLOTS)[node]))
            self.tell(node, "SET-CONFIG-EPOCH", node + 1)
        for node in (1, 2, 3):
            self.tell(node, "MEET", "127.0.0.1", self.ports[0])
        eventually(lambda: all(self.state(node).get("cluster_known_nodes") == "4" for node in range(4)), 20)
        master = self.tell(1, "MYID")
        eventually(lambda: master.decode() in str(self.tell(3, "NODES")), 20)
        self.tell(3, "REPLICATE", master)
        eventually(lambda: all(self.state(node)["cluster_state"] == "ok" for node in range(4)), 20)
        eventually(lambda: self.clients[3].info("replication").get("master_link_status") == "up", 20)

    def answers(self, node: int) -> bool:
        try:
            return bool(self.clients[node].ping())
        except redis.ConnectionError:
            return False

    def state(self, node: int) -> dict[str, str]:
        found = self.tell(node, "INFO")
        return found if isinstance(found, dict) else dict(line.split(":") for line in found.decode().split())

    def owner(self, run: str) -> int:
        slot = int(self.clients[0].execute_command("CLUSTER", "KEYSLOT", f"{{{run}}}"))
        return (slot >= 5461) + (slot >= 10923)

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


@pytest.fixture(scope="module", params=BINARIES, ids=name_of)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, eventually: Eventually) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    running = Cluster(request.param, folder)
    try:
        running.join(eventually)
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder)


def make(buffer: ReplayBuffer, count: int, version: int) -> list[int]:
    made = []
    for _ in range(count):
        lease = buffer.lease("a", 30)
        assert lease is not None
        assert buffer.commit(lease, b"payload %d" % lease.group, [1.0, 2.0], version)
        made.append(lease.group)
    return made


def whole_step(buffer: ReplayBuffer, step: int, epoch: int) -> list[int]:
    make(buffer, buffer.settings.groups_per_step, step - 1)
    number = buffer.lease_data("f", 30)
    assert number is not None
    buffer.commit_data(number, b"data %d" % number)
    claim = buffer.claim(step, epoch, 30)
    assert [buffer.fetch(group) for group in claim.groups] == [b"payload %d" % group.group for group in claim.groups]
    assert [buffer.fetch(item) for item in claim.data] == [b"data %d" % item.batch for item in claim.data]
    buffer.publish(step, epoch)
    return [group.group for group in claim.groups]


SETTINGS = BufferSettings(groups_per_step=2, data_per_step=1, checkpoint_interval=2, max_attempts=1)


def test_every_call_works_whichever_node_the_url_names(cluster: Cluster) -> None:
    owners = set()
    for run in ("alpha", "beta", "gamma", "delta"):
        owners.add(cluster.owner(run))
        for node in range(4):
            name = f"{run}-{node}"
            buffer = ReplayBuffer(connect(cluster.url(node)), name, SETTINGS)
            buffer.initialise()
            epoch = buffer.rollback(0)
            lease = buffer.lease("a", 0)
            assert lease is not None
            buffer.fail(lease, "x")
            assert buffer.requeue(0)
            for step in (1, 2, 3):
                whole_step(buffer, step, epoch)
            buffer.settle(2)
            other = ReplayBuffer.attach(connect(cluster.url((node + 1) % 4)), name)
            epoch = other.rollback(2)
            assert [group.group for group in other.claim(3, epoch, 0).groups] == [4, 5]
            assert other.dead_letters() == []
            other.publish(3, epoch)
            assert other.audit() == []
            assert other.trim() == {"trash": 0, "orphans": 0}
            assert other.forget() > 10
            with pytest.raises(redis.RedisError):
                redis.Redis(port=cluster.ports[(cluster.owner(name) + 1) % 3]).get(f"ddrl:{{{name}}}:meta")
    assert len(owners) > 1, "the runs live on different nodes"


def test_a_run_goes_on_after_its_node_is_killed(cluster: Cluster, eventually: Eventually) -> None:
    run = next(name for name in map(str, range(100)) if cluster.owner(name) == 1)
    buffer = ReplayBuffer(connect(cluster.url(0)), run, SETTINGS)
    buffer.initialise()
    epoch = buffer.rollback(0)
    trained = whole_step(buffer, 1, epoch)
    make(buffer, 2, 1)
    eventually(lambda: cluster.clients[1].execute_command("WAIT", 1, 100) == 1, 20)  # replication is asynchronous
    cluster.processes[1].kill()
    cluster.processes[1].wait()
    number = buffer.lease_data("f", 60)
    assert number == 1
    buffer.commit_data(1, b"data 1")
    claim = buffer.claim(2, epoch, 60)
    assert [buffer.fetch(group) for group in claim.groups] == [b"payload 2", b"payload 3"]
    buffer.publish(2, epoch)
    trained += [group.group for group in claim.groups]
    trained += whole_step(buffer, 3, epoch)
    assert trained == [0, 1, 2, 3, 4, 5]
    assert buffer.audit() == []
    buffer.settle(2)
    with pytest.raises(ClaimTimeout):
        buffer.claim(4, epoch, 0)
    fresh = ReplayBuffer.attach(connect(cluster.url(2)), run)
    assert fresh.counts()["settled"] == 4
    assert cluster.clients[3].info("replication")["role"] == "master"
