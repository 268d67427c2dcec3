"""A real SIGTERM to `ddrl serve` before Ray is up, while the rewards start, while it serves, and twice."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import psutil
import pytest

from services.client.rest import RestRewardClient
from tests.pipeline import ROOT

DEADLINE_S = 30.0  # Kubernetes' terminationGracePeriodSeconds
SLOW = "tests.integration.services.probe_scorers:Mean"


class Service:
    """`ddrl serve` of a slow reward in a folder of its own, with a temporary folder that is looked at afterwards."""

    def __init__(self, folder: Path, **settings: str) -> None:
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        more = "".join(f"{key}: {value}\n" for key, value in settings.items())
        (folder / "rewards.yaml").write_text(f"rewards: {{mean: {{kind: '{SLOW}', delay_s: 1.0}}}}\nport: 0\n{more}")
        # Ray's sockets have short paths, so only the log goes into our folder
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "RAY_AUTH_MODE": "disabled", "TMPDIR": str(self.temporary), "RAY_TMPDIR": "/tmp"}
        environment.pop("RAY_ADDRESS", None)
        command = [sys.executable, "-u", "-m", "trainer", "serve", "rewards.yaml"]
        self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        self.lines.extend(iter(self.process.stdout.readline, ""))

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def until(self, condition: Callable[[], object]) -> None:
        deadline = time.monotonic() + 180
        while not condition():
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.02)

    def url(self) -> str:
        self.until(lambda: "ready: " in self.output)
        found = re.search(r"ready: (http://\S+)", self.output)
        assert found is not None
        return found[1]

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def status(self) -> int:
        """Exit status within the deadline."""
        status = self.process.wait(DEADLINE_S)
        self._reader.join(10)
        return status

    def logs(self) -> list[str]:
        return [path.name for path in self.temporary.glob("ddrl-serve-*.log")]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., Service]]:
    made: list[Service] = []

    def start(**settings: str) -> Service:
        made.append(Service(tmp_path, **settings))
        return made[-1]

    yield start
    for service in made:
        if service.process.poll() is None:
            service.process.kill()


def children(service: Service) -> list[psutil.Process]:
    return psutil.Process(service.process.pid).children(recursive=True)


def words_of(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""  # it has ended


@pytest.mark.parametrize("moment", ["imports", pytest.param("ray", marks=pytest.mark.long), pytest.param("rewards", marks=pytest.mark.long)])
def test_before_it_is_ready_it_ends_with_143_and_leaves_nothing(serve: Callable[..., Service], moment: str) -> None:
    service = serve()
    service.until(lambda: "starting the rewards: mean" in service.output)
    if moment == "ray":
        service.until(lambda: any("gcs_server" in words_of(process) for process in children(service)))
    if moment == "rewards":
        service.until(lambda: any("ServeReplica" in words_of(process) for process in children(service)))
    started = children(service)
    service.terminate()
    assert service.status() == 143
    assert "ddrl: SIGTERM while starting" in service.output
    assert "Traceback" not in service.output
    assert service.logs() == []
    gone, alive = psutil.wait_procs(started, timeout=20)
    assert alive == []
    assert len(gone) == len(started)


@pytest.mark.long
def test_while_it_serves_what_was_accepted_is_finished(serve: Callable[..., Service]) -> None:
    service = serve()
    client = RestRewardClient(service.url())
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.extend(client.score("mean", ["a"], np.zeros((1, 8, 8, 3), np.uint8), 30)))
    asking.start()
    time.sleep(0.4)
    service.terminate()
    assert service.status() == 0
    asking.join(30)
    assert len(answers) == 1
    assert "stopping: finishing what was accepted" in service.output
    assert service.logs() == []


@pytest.mark.long
def test_what_is_still_open_at_the_end_is_said_and_the_log_stays(serve: Callable[..., Service]) -> None:
    service = serve(drain_s="0.2")
    url = service.url()
    asking = threading.Thread(target=lambda: _quietly(url), daemon=True)
    asking.start()
    time.sleep(0.4)
    service.terminate()
    assert service.status() == 1
    (log,) = service.logs()
    assert re.search(rf"requests were still open after 0\.2 s \(log: \S*{re.escape(log)}\)", service.output)


def _quietly(url: str) -> None:
    try:
        httpx.post(f"{url}/v1/score", data={"prompt": ["a"] * 5}, files={"file": ("a.npy", _npy())}, timeout=20)
    except httpx.HTTPError:
        return


def _npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((5, 8, 8, 3), np.uint8))
    return buffer.getvalue()
