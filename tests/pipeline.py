"""Whole runs through the command line in processes of their own: start, watch, kill, and look at what they left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from replay.buffer import ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from trainer.config.load import load_config
from trainer.run.folder import RunFolder

ROOT = Path(__file__).parents[1]
RUN_DEADLINE_S = 420.0

# The demo's recipe, smaller in every direction that costs time; the same code runs.
REDUCED = (
    "updates=4",
    "checkpoint_every=2",
    "rollout.group_size=4",
    "rollout.groups_per_step=4",
    "evaluation.every=2",
    "evaluation.test_prompts=24",
    "evaluation.dev_prompts=8",
    "evaluation.loss_points=32",
    "evaluation.diversity_prompts=4",
    "evaluation.diversity_samples=4",
    "evaluation.grid_prompts=8",
)


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "trainer", *arguments]


def settings(*values: str) -> list[str]:
    return [part for value in values for part in ("--set", value)]


class Run:
    """A `ddrl train` process.

    Args:
        folder: its run folder.
        arguments: further arguments.
        recipe: its recipe.
        program: the module that is run; `trainer` is `ddrl`.
        environment: variables beside this process's own.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        recipe: str = "recipes/glyph-ocr.yaml",
        program: str = "trainer",
        environment: dict[str, str] | None = None,
    ) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-m", program, "train", recipe, "--run-dir", str(folder), *arguments],
            cwd=ROOT,
            env=os.environ | (environment or {}),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self.family: list[psutil.Process] = []

    def updates(self) -> int:
        """Updates in metrics.jsonl so far."""
        file = self.folder / "metrics.jsonl"
        return file.read_text().count('"kind": "update"') if file.exists() else 0

    def wait_for(self, condition: Callable[[], bool], what: str, deadline_s: float = RUN_DEADLINE_S) -> None:
        """Wait until `condition`, or fail with the run's output."""
        end = time.monotonic() + deadline_s
        while not condition():
            if self.process.poll() is not None or time.monotonic() > end:
                out, err = self.abort()
                pytest.fail(f"{what} did not come about; exit {self.process.returncode}\n{out[-3000:]}\n{err[-3000:]}")
            self.remember_family()
            time.sleep(0.2)

    def abort(self) -> tuple[str, str]:
        """End it as a person would, or by force; what it said."""
        self.process.send_signal(signal.SIGINT)
        try:
            return self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.communicate(timeout=20)

    def remember_family(self) -> None:
        """Note every process of the run, so that `leftovers` can look for them afterwards."""
        known = {p.pid for p in self.family}
        try:
            children = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return
        self.family.extend(p for p in children if p.pid not in known)

    def titles(self) -> list[str]:
        """Command lines of the run's processes, now."""
        self.remember_family()
        return [title_of(process) for process in self.family]

    def kill(self, title: str) -> int:
        """SIGKILL one process of the run whose title contains `title`; returns its pid."""
        self.remember_family()
        for process in self.family:
            try:
                name = " ".join(process.cmdline())
                if title in name:
                    os.kill(process.pid, signal.SIGKILL)
                    return process.pid
            except psutil.NoSuchProcess:
                continue
        pytest.fail(f"no process titled {title} in the run")

    def finish(self) -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        end = time.monotonic() + RUN_DEADLINE_S
        while self.process.poll() is None and time.monotonic() < end:
            self.remember_family()
            try:
                out, err = self.process.communicate(timeout=1)
                return self.process.returncode, out, err
            except subprocess.TimeoutExpired:
                continue
        out, err = self.process.communicate(timeout=30)
        return self.process.returncode, out, err

    def succeed(self) -> None:
        """Wait for a good end, or fail with all the run said."""
        code, out, err = self.finish()
        if code != 0:
            pytest.fail(f"exit {code}\n{out[-4000:]}\n{err[-4000:]}")

    def leftovers(self, patience_s: float = 20.0) -> list[str]:
        """Processes of the run that outlive it by more than `patience_s`.

        After a SIGKILL of the driver, Ray's own agents and workers that were just being born try for more than a minute to reach
        the dead GCS before they give up; they do not count.
        """
        killed = self.process.returncode == -signal.SIGKILL
        family = [p for p in self.family if not (killed and _is_rays_own(p))]
        end = time.monotonic() + patience_s
        while (alive := list(filter(_is_alive, family))) and time.monotonic() < end:
            time.sleep(0.2)
        return [f"{p.pid} {title_of(p)}" for p in alive]

    def end(self) -> None:
        """Whatever state it is in, nothing of it goes on."""
        if self.process.poll() is None:
            self.remember_family()
            self.process.kill()
            self.process.wait(10)
        for process in self.family:
            if process.is_running():
                process.kill()


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def title_of(process: psutil.Process) -> str:
    """Command line of a process, '' when it is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _is_rays_own(process: psutil.Process) -> bool:
    return any(name in title_of(process) for name in ("DashboardAgent", "RuntimeEnvAgent", "dashboard/agent.py", "runtime_env/agent", "default_worker.py"))


def ledger(folder: Path, url: str | None = None) -> tuple[list[str], dict[str, int]]:
    """(findings of the audit, counts) of a finished run's ledger, at `url` or read from its append-only file."""
    config = load_config(folder / "config.yaml")
    with ExitStack() as stack:
        found = url or stack.enter_context(EmbeddedRedis.start(folder / "redis")).url
        buffer = ReplayBuffer.attach(connect(found), config.name)
        return buffer.audit(), buffer.counts()


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in metrics.jsonl and evaluations.jsonl."""
    return [r for r in RunFolder(folder).records() if r["kind"] == kind]


def check_ledger(folder: Path, updates: int, groups_per_step: int = 4, url: str | None = None) -> dict[str, int]:
    """The promises of the replay buffer, after a run that ended well; returns the ledger's counts.

    Every index is accounted for; the surviving model was trained once on every settled group and on nothing else.
    """
    findings, counts = ledger(folder, url)
    assert findings == []
    lines = records(folder, "update")
    assert [r["step"] for r in lines] == list(range(1, updates + 1))
    trained = [group for r in lines for group in r["trained_groups"]]
    assert len(trained) == len(set(trained)) == counts["settled"] == updates * groups_per_step
    assert counts["dead"] == 0
    assert counts["claimed"] == 0
    staleness = load_config(folder / "config.yaml").replay.max_staleness
    assert all(r["staleness_max"] <= staleness for r in lines)
    return counts
