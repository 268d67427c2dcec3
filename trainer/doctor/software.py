"""Gathering: Python, packages beside their pins, torch, xformers, NVIDIA's driver. What may hang or crash runs in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement

from trainer.doctor.facts import GPU, Attention, Package, Software, Torch, Xformers

PROBE_DEADLINE_S = 300.0
"""For importing torch and xformers and a few small calls, also from a cold network disk."""
DRIVER_DEADLINE_S = 20.0
QUERY = "name,memory.total,compute_cap,driver_version"
MIB = 1 << 20


def gather_software(probe_deadline_s: float = PROBE_DEADLINE_S) -> Software:
    """Everything about Python and its packages on this machine."""
    about = metadata.metadata("ddrl")
    told = probe(probe_deadline_s)
    return Software(
        python=platform.python_version(),
        requires_python=about["Requires-Python"],
        packages=packages(metadata.requires("ddrl") or []),
        torch=torch_of(told.get("torch", {})),
        xformers=xformers_of(told.get("xformers", {})),
        driver_gpus=driver_gpus(),
    )


def packages(requirements: list[str]) -> tuple[Package, ...]:
    """Requirements as a distribution names them, beside what is installed. Of `dev` and `bench` nothing: a run needs neither."""
    found: dict[tuple[str, str], Package] = {}
    for text in requirements:
        wanted = Requirement(text)
        extra = next((e for e in ("gpu", "models", "wandb") if wanted.marker and wanted.marker.evaluate({"extra": e})), "")
        if wanted.marker is None or extra:
            found[wanted.name, extra] = Package(wanted.name, str(wanted.specifier), _version(wanted.name), extra)
    return tuple(found.values())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def probe(deadline_s: float, command: Sequence[str] = (sys.executable, "-m", "trainer.doctor.probe")) -> dict[str, Any]:
    """What `trainer.doctor.probe` prints; with `error` of torch set where it prints nothing before the deadline."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=deadline_s, check=False, env={**os.environ, "TOKENIZERS_PARALLELISM": "false"})
    except subprocess.TimeoutExpired:
        return {"torch": {"error": f"importing it and a small call took more than {deadline_s:.0f} s"}}
    lines = done.stdout.strip().splitlines()
    try:
        answer: dict[str, Any] = json.loads(lines[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return {"torch": {"error": f"asking it ended with status {done.returncode}: {last[:200]}"}}
    return answer


def torch_of(told: Mapping[str, Any]) -> Torch:
    """Torch as the probe tells of it."""
    if "version" not in told:
        return Torch(error=str(told.get("error", "unknown")))
    gpus = tuple(GPU(g["name"], g["memory"], (g["capability"][0], g["capability"][1])) for g in told["gpus"])
    return Torch(told["version"], told["cuda"], gpus, told["bf16"], tuple(Attention(**each) for each in told["attention"]))


def xformers_of(told: Mapping[str, Any]) -> Xformers:
    """Xformers: its metadata from the wheel's own file, the rest as the probe tells it."""
    version = _version("xformers")
    if version is None:
        return Xformers()
    built: dict[str, Any] = {}
    for file in metadata.files("xformers") or []:
        if str(file) == "xformers/cpp_lib.json":
            built = json.loads(file.read_text())["version"]
    return Xformers(version, built.get("torch") or "", built.get("cuda"), told.get("error"))


def driver_gpus() -> tuple[GPU, ...]:
    """GPUs that nvidia-smi lists; none where it is missing or does not answer."""
    command = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER_DEADLINE_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    return parse_driver(text)


def parse_driver(text: str) -> tuple[GPU, ...]:
    """Lines of nvidia-smi's query `QUERY`, memory in MiB; a line with an unknown value is left out."""
    found = []
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        try:
            name, memory, capability, driver = cells
            major, minor = capability.split(".")
            found.append(GPU(name, int(memory) * MIB, (int(major), int(minor)), driver))
        except ValueError:
            continue
    return tuple(found)
