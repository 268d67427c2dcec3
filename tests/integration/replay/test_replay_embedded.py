"""The embedded server as a process: secrets, resume, crashes, the watchdog, and clear errors."""

import os
import secrets
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import redis

from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis, Fsync, _wheel_server, find_server, memory_limit
from replay.errors import EmbeddedServerError, ReplayError, Unreachable, UnsuitableServer
from replay.payloads import FolderPayloads
from replay.policy import SERVER_OVERHEAD_BYTES

ROOT = Path(__file__).resolve().parents[3]
Eventually = Callable[[Callable[[], bool], float], None]


def gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def server_pid(server: EmbeddedRedis) -> int:
    return int(connect(server.url).info()["process_id"])


def buffer_on(server: EmbeddedRedis, **settings: int) -> ReplayBuffer:
    buffer = ReplayBuffer(connect(server.url), "run", BufferSettings(groups_per_step=2, **settings))
    buffer.initialise()
    return buffer


def make(buffer: ReplayBuffer, count: int, version: int) -> list[int]:
    made = []
    for _ in range(count):
        lease = buffer.lease("a", 5)
        assert lease is not None
        assert buffer.commit(lease, b"payload", [1.0], version)
        made.append(lease.group)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("embedded") / "redis"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[EmbeddedRedis]:
    """For tests that leave it running and unchanged."""
    with EmbeddedRedis.start(folder) as running:
        yield running


def test_it_is_private(server: EmbeddedRedis, folder: Path) -> None:
    pid = server_pid(server)
    password = server.url.split("@")[0].removeprefix("redis://:")
    listening = {c.laddr.ip for c in psutil.Process(pid).net_connections("inet") if c.status == "LISTEN"}
    assert listening == {"127.0.0.1"}
    commands = [" ".join(process.cmdline()) for process in (psutil.Process(pid), psutil.Process(pid).parent())]
    assert not any(password in command for command in commands)
    assert stat.S_IMODE((folder / "redis.conf").stat().st_mode) == 0o600
    assert os.getsid(pid) not in (os.getsid(0), 0), "Ctrl-C in our terminal must not reach it"
    with pytest.raises(redis.AuthenticationError):
        redis.Redis.from_url(server.url.replace(password, ""), retry=None).ping()
    options = connect(server.url).config_get("append*")
    assert (options["appendonly"], options["appendfsync"]) == ("yes", "everysec")


def test_stop_and_resume_on_the_same_folder(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, max_bytes=100 << 20) as server:
        pid = server_pid(server)
        make(buffer_on(server, max_bytes=100 << 20), 2, 0)
        first = server.url
    server.stop()
    assert gone(pid)
    with EmbeddedRedis.start(tmp_path) as server:
        assert server.url != first, "a new password every start"
        buffer = buffer_on(server)
        assert [group.group for group in buffer.claim(1, buffer.rollback(0), 0).groups] == [0, 1]


def test_a_folder_serves_one_server_only(server: EmbeddedRedis, folder: Path) -> None:
    started = time.monotonic()
    with pytest.raises(EmbeddedServerError, match="another redis-server uses"):
        EmbeddedRedis.start(folder, timeout_s=0.2)
    assert time.monotonic() - started < 2


def test_an_older_server_is_refused(tmp_path: Path) -> None:
    (tmp_path / "server.json").write_text('{"version": "99.1.0"}')
    with pytest.raises(EmbeddedServerError, match=r"written by redis-server 99\.1\.0"):
        EmbeddedRedis.start(tmp_path)


def test_too_small_a_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match=r"free some disk, lower replay\.max_bytes"):
        EmbeddedRedis.start(tmp_path, max_bytes=1 << 60)


def test_too_little_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = tmp_path / "memory.max"
    monkeypatch.setattr("replay.embedded.CGROUP_LIMITS", (tmp_path / "absent", limit))
    limit.write_text("max\n")
    assert memory_limit() > 1 << 28
    limit.write_text(f"{200 << 20}\n")
    with pytest.raises(EmbeddedServerError, match=r"209\.7 MB of memory; .* may take 257\.9 MB while its log is rewritten"):
        EmbeddedRedis.start(tmp_path / "redis", max_bytes=100 << 20)
    EmbeddedRedis.start(tmp_path / "redis", max_bytes=0).stop()


def test_fsync_and_memory_are_as_asked(tmp_path: Path) -> None:
    with EmbeddedRedis.start(tmp_path, max_bytes=0, fsync="always") as server:
        client = connect(server.url)
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        assert client.config_get("maxmemory") == {"maxmemory": str(SERVER_OVERHEAD_BYTES)}
        ReplayBuffer(client, "run", BufferSettings(groups_per_step=1), FolderPayloads(tmp_path / "payloads")).initialise()
        with pytest.raises(UnsuitableServer, match="is below"):
            ReplayBuffer(client, "run2", BufferSettings(groups_per_step=1)).initialise()


def test_a_server_that_cannot_start_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "appendonlydir").write_text("not a folder")
    (tmp_path / "appendonly.aof").mkdir()
    with pytest.raises(EmbeddedServerError, match=r"log: .*append-?only"):
        EmbeddedRedis.start(tmp_path, timeout_s=20)


def test_the_wheels_binary_is_found_without_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    binary, version = find_server()
    assert str(binary) == _wheel_server()
    assert version.startswith("6.2.")


@pytest.mark.parametrize("fsync", ["always", "everysec"])
def test_acknowledged_commits_survive_kill_9_of_the_server(tmp_path: Path, eventually: Eventually, fsync: Fsync) -> None:
    """The supervisor starts it again under the same address; clients in flight ride it out.

    With everysec a server whose disk is busy holds writes back for up to 2 s; what it then loses is made again.
    """
    with EmbeddedRedis.start(tmp_path / "redis", fsync=fsync) as server:
        buffer = buffer_on(server, max_staleness=200)
        acknowledged: list[int] = []
        done = threading.Event()
        errors: list[BaseException] = []

        def produce() -> None:
            try:
                while not done.is_set():
                    acknowledged.extend(make(buffer, 1, 0))
            except BaseException as error:
                errors.append(error)

        producer = threading.Thread(target=produce)
        producer.start()
        for _ in range(2):
            before = len(acknowledged)
            eventually(lambda before=before: len(acknowledged) > before + 10 or bool(errors), 20)
            os.kill(server_pid(server), signal.SIGKILL)
        before = len(acknowledged)
        eventually(lambda: len(acknowledged) > before + 10 or bool(errors), 20)
        eventually(lambda: set(acknowledged) <= buffer._ledger.snapshot().ready or bool(errors), 20)
        done.set()
        producer.join(20)
        assert errors == []
        assert set(acknowledged) <= buffer._ledger.snapshot().ready
        if fsync == "always":
            assert len(acknowledged) == len(set(acknowledged)), "no group was handed out twice"
        assert buffer.audit() == []


def test_a_lost_tail_of_the_log_is_healed_from_the_checkpoint(tmp_path: Path) -> None:
    """With everysec, a crash of the whole machine may lose the last second or two."""
    binary = Path(str(_wheel_server()))  # 6.2 keeps its log in one file, which is easy to cut
    log = tmp_path / "appendonly.aof"
    with EmbeddedRedis.start(tmp_path, fsync="always", server=binary) as server:
        buffer = buffer_on(server, max_staleness=0)
        epoch = buffer.rollback(0)
        make(buffer, 2, 0)
        buffer.claim(1, epoch, 0)
        buffer.publish(1, epoch)
        durable = log.stat().st_size
        trained = make(buffer, 2, 1)
        buffer.claim(2, epoch, 0)
        buffer.publish(2, epoch)
        os.kill(server._process.pid, signal.SIGTERM)
        server._process.wait(15)
    os.truncate(log, durable + 30)  # also cuts a record in half
    with EmbeddedRedis.start(tmp_path, server=binary) as server:
        buffer = buffer_on(server, max_staleness=0)
        assert buffer.counts()["claimed_step"] == 1, "the claim of step 2 is lost"
        epoch = buffer.rollback(2, groups=[0, 1, *trained])
        assert buffer.audit() == []
        counts = buffer.counts()
        assert (counts["settled"], counts["version"], counts["next_group"]) == (4, 2, 4)
        assert make(buffer, 2, 2) == [4, 5]
        assert [group.group for group in buffer.claim(3, epoch, 0).groups] == [4, 5]


def test_the_server_dies_with_a_sigkilled_parent(tmp_path: Path, eventually: Eventually) -> None:
    code = (
        "import sys, time; from pathlib import Path; from replay.embedded import EmbeddedRedis\n"
        "from replay.connect import connect\n"
        "server = EmbeddedRedis.start(Path(sys.argv[1]))\n"
        "print(connect(server.url).info()['process_id'], flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    supervisor = psutil.Process(pid).ppid()
    assert psutil.Process(supervisor).ppid() == parent.pid
    parent.kill()
    parent.wait(10)
    eventually(lambda: gone(pid) and gone(supervisor), 10)
    EmbeddedRedis.start(tmp_path).stop()


def test_the_server_dies_with_a_sigkilled_supervisor(tmp_path: Path, eventually: Eventually) -> None:
    server = EmbeddedRedis.start(tmp_path)
    pid = server_pid(server)
    os.kill(server._process.pid, signal.SIGKILL)
    eventually(lambda: gone(pid), 10)
    server.stop()


def test_unreachable_is_one_clear_line_without_the_password() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        password = secrets.token_hex(8)
        started = time.monotonic()
        with pytest.raises(Unreachable) as caught:
            connect(f"redis://:{password}@127.0.0.1:{port}/0", timeout=0.3)
    message = str(caught.value)
    assert time.monotonic() - started < 2
    assert message.startswith(f"cannot reach Redis at redis://:***@127.0.0.1:{port}/0: ")
    assert message.endswith("start one or set redis.url=embedded")
    assert "\n" not in message
    assert password not in message
    assert caught.value.__cause__ is None


def test_a_wrong_password_and_a_wrong_url_are_told_apart(server: EmbeddedRedis) -> None:
    right = server.url.split("@")[0].removeprefix("redis://:")
    with pytest.raises(Unreachable, match="refuses the password") as caught:
        connect(server.url.replace(right, "wrong-one"), timeout=1)
    assert "wrong-one" not in str(caught.value)
    with pytest.raises(ReplayError, match="not usable"):
        connect("http://:secret@host", timeout=1)


def test_losing_the_server_is_a_typed_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replay.connect.RETRIES", 1)
    with EmbeddedRedis.start(tmp_path) as server:
        buffer = buffer_on(server)
    with pytest.raises(Unreachable, match=r"lost Redis at 127\.0\.0\.1:\d+"):
        buffer.counts()


def test_the_example_of_the_readme_runs(tmp_path: Path) -> None:
    text = (ROOT / "replay" / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout.splitlines()[0] == "b'safetensors bytes'"
    assert done.stdout.splitlines()[1].endswith(" []")
