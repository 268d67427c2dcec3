"""A Ray head node of its own processes, to be joined by runs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.pipeline import ROOT

ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)}
"""What whoever joins it needs."""
RAY = str(Path(sys.executable).parent / "ray")


class Head:
    """A running head node. `jobs`: where `ray job …` reaches it, '' without a dashboard."""

    def __init__(self, address: str, process: subprocess.Popen[bytes], jobs: str = "") -> None:
        self.address, self.process, self.jobs = address, process, jobs

    def answers(self) -> bool:
        status = subprocess.run([RAY, "status", "--address", self.address], env=os.environ | ENVIRONMENT, capture_output=True, timeout=60, check=False)
        return status.returncode == 0

    def actors(self) -> list[str]:
        """Titles of the processes that runs have on it."""
        titles = [" ".join(p.cmdline()) for p in psutil.Process(self.process.pid).children(recursive=True)]
        return [title for title in titles if title.startswith("ray::")]


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextmanager
def head_node(cpus: int = 16, dashboard: bool = False) -> Iterator[Head]:
    """Start a head on free ports in a folder of its own: in the default one it leaves its address behind for every later `ray.init()`."""
    port, jobs = free_port(), ""
    folder = tempfile.mkdtemp(prefix="ray")
    options = [
        f"--temp-dir={folder}",
        f"--num-cpus={cpus}",
        f"--include-dashboard={str(dashboard).lower()}",
        f"--port={port}",
        "--object-store-memory=200000000",
    ]
    if dashboard:
        web = free_port()
        jobs = f"http://127.0.0.1:{web}"
        options += [f"--dashboard-port={web}", f"--dashboard-agent-listen-port={free_port()}"]
    process = subprocess.Popen(
        [RAY, "start", "--head", "--block", *options], env=os.environ | ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        head = Head(f"127.0.0.1:{port}", process, jobs)
        wait_until(head.answers, "the cluster")
        yield head
    finally:
        process.terminate()
        process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], what: str, deadline_s: float = 90) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not come up"
        time.sleep(0.5)
