"""A Ray cluster of one run on this machine: folders and ports of its own, gone with the run.

Ray's folder is `ddrl-ray-…` in the temporary folder; its file `lock` is held by the driver while it lives. What a driver that was
killed has left is provably ours when the lock is free: `sweep`, at each start and in `ddrl clean`, ends the processes that carry
the folder's name in their environment and removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from trainer.learn.entry import FOLDER_VARIABLE

PREFIX = "ddrl-ray-"
LONGEST_ROOT = 30
"""Unix sockets lie some 75 characters below the folder, and their paths end at 107."""


def temporary_root() -> Path:
    """Where the folders of local clusters lie: the temporary folder, or /tmp when its path is too long for sockets."""
    root = Path(tempfile.gettempdir())
    return root if len(str(root)) <= LONGEST_ROOT else Path("/tmp")


def own_folder(stack: ExitStack) -> Path:
    """A new folder for a cluster of this process; processes started from now on carry its name. With `stack` both go."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=temporary_root()))
    lock = (folder / "lock.partial").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    (folder / "lock.partial").rename(folder / "lock")  # a sweep never sees one that is free
    os.environ[FOLDER_VARIABLE] = str(folder)

    def remove() -> None:
        end_processes(folder)
        os.environ.pop(FOLDER_VARIABLE, None)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()

    stack.callback(remove)
    return folder


@contextlib.contextmanager
def free_ports() -> Iterator[None]:
    """Inside, a cluster that is started takes free ports throughout. By itself Ray gives every cluster's agent 52365, and
    whoever needs it next (`ray start`) fails; `ray.init` has no setting for it."""
    from ray._private import parameter

    class Free(parameter.RayParams):  # type: ignore[misc]
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **{"dashboard_agent_listen_port": 0} | settings)

    names, given = vars(parameter), parameter.RayParams
    names["RayParams"] = Free
    try:
        yield
    finally:
        names["RayParams"] = given


def sweep() -> list[Path]:
    """Remove what clusters of dead drivers have left; returns their folders."""
    swept = leftovers()
    for folder in swept:
        end_processes(folder)
        shutil.rmtree(folder, ignore_errors=True)
    return swept


def leftovers() -> list[Path]:
    """Folders of clusters of dead drivers: what `sweep` removes."""
    return [folder for folder in sorted(temporary_root().glob(f"{PREFIX}*")) if _is_dead(folder)]


def _is_dead(folder: Path) -> bool:
    """Whether the folder is this user's and its driver is gone."""
    try:
        if folder.stat().st_uid != os.getuid():
            return False
        with (folder / "lock").open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:  # held, somebody else's, or just being made
        return False


def end_processes(folder: Path, patience_s: float = 5.0) -> None:
    """Kill this user's processes that carry the folder's name in their environment (Linux; elsewhere they end by themselves).

    A process in the middle of its `exec` has no environment to be seen by: none is left when two looks in a row find none.
    """
    end, quiet = time.monotonic() + patience_s, 0
    while quiet < 2 and time.monotonic() < end:
        left = _processes(folder)
        quiet = 0 if left else quiet + 1
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _processes(folder: Path) -> list[int]:
    needle = f"{FOLDER_VARIABLE}={folder}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(entry.name) != os.getpid() and needle in (entry / "environ").read_bytes().split(b"\0") and _runs(entry):
                found.append(int(entry.name))
    return found


def _runs(entry: Path) -> bool:
    return (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
