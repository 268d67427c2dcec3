"""Gathering: memory, disks, limits, environment, servers, and what earlier runs have left. The hub is asked in `trainer.doctor.hub`."""

from __future__ import annotations

import os
import resource
import shutil
from pathlib import Path

from trainer.doctor.facts import Disk, Machine
from trainer.doctor.hub import owner

WATCHED = ("CUDA_VISIBLE_DEVICES", "HF_HUB_OFFLINE", "ONEDNN_MAX_CPU_ISA", "OMP_NUM_THREADS", "TMPDIR")
"""Environment variables that matter beside RAY_*."""
SECRET = ("RAY_AUTH_TOKEN",)
"""Whose values are never kept, only that they are set."""


def gather_machine(runs: Path, online: bool) -> Machine:
    """Facts of this machine. `runs`: where run folders go. `online`: ask the hub who its token belongs to."""
    from huggingface_hub import get_token

    from replay.embedded import memory_limit, servers
    from trainer.run.local_ray import leftovers, temporary_root

    token = get_token()
    return Machine(
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=memory_limit(),
        available=available(),
        shm=shutil.disk_usage("/dev/shm").free if Path("/dev/shm").is_dir() else None,
        disks=(disk("run folders", runs), disk("temporary files", temporary_root())),
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE),
        environment=environment(os.environ),
        redis_servers=tuple(servers()),
        leftovers=tuple(map(str, leftovers())),
        token=token is not None,
        hub=owner(token) if online and token is not None else None,
    )


def environment(variables: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """RAY_* and what else matters; of secrets only that they are set."""
    kept = {name: value for name, value in variables.items() if name.startswith("RAY_") or name in WATCHED}
    return {name: "set" if name in SECRET else value for name, value in kept.items()}


def available(file: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of memory that can be had without swapping, None where the system does not say (Linux says)."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def disk(what: str, path: Path) -> Disk:
    """Room at `path`, or at the nearest folder above it that exists."""
    there = next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())
    usage = shutil.disk_usage(there)
    return Disk(what, str(path), usage.free, usage.total)
