"""What killed drivers leave is swept, what lives is left alone."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from trainer.learn.entry import FOLDER_VARIABLE
from trainer.run import local_ray
from trainer.run.local_ray import leftovers, own_folder, sweep

DRIVER = """
import os, subprocess, sys
from contextlib import ExitStack
from pathlib import Path
from trainer.run import local_ray
from trainer.run.local_ray import own_folder
local_ray.temporary_root = lambda: Path(sys.argv[1])
stack = ExitStack()
folder = own_folder(stack)
child = subprocess.Popen(["sleep", "100"], start_new_session=True)
print(folder, child.pid, flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(local_ray, "temporary_root", lambda: tmp_path)
    return tmp_path


def test_a_folder_goes_with_its_driver(root: Path) -> None:
    with ExitStack() as stack:
        folder = own_folder(stack)
        assert os.environ[FOLDER_VARIABLE] == str(folder)
        assert sweep() == []
        child = subprocess.Popen(["sleep", "100"])
    assert child.wait(10) == -9
    assert list(root.iterdir()) == []
    assert FOLDER_VARIABLE not in os.environ


def test_a_process_that_one_look_does_not_see_is_killed(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of its `exec` it has no environment yet."""
    looks = iter([lambda folder: []])
    look = local_ray._processes
    monkeypatch.setattr(local_ray, "_processes", lambda folder: next(looks, look)(folder))
    with ExitStack() as stack:
        own_folder(stack)
        child = subprocess.Popen(["sleep", "100"])
    assert child.wait(10) == -9


def test_a_killed_driver_is_swept_and_a_living_one_is_not(root: Path) -> None:
    command = [sys.executable, "-c", DRIVER, str(root)]
    drivers = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        told = [driver.stdout.readline().split() for driver in drivers if driver.stdout is not None]
        drivers[0].kill()
        drivers[0].wait(10)
        assert leftovers() == [Path(told[0][0])]
        assert leftovers()[0].is_dir()  # looked at, not removed
        assert sweep() == [Path(told[0][0])]
        assert not _alive(int(told[0][1]))
        assert _alive(int(told[1][1]))
        assert Path(told[1][0]).is_dir()
    finally:
        for driver in drivers:
            driver.kill()
            driver.wait(10)
        sweep()


def test_folders_that_are_no_clusters_of_ours_stay(root: Path) -> None:
    (root / "ddrl-ray-notes").mkdir()
    (root / "session_1").mkdir()
    assert sweep() == []
    assert len(list(root.iterdir())) == 2


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
