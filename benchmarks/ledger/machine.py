"""The machine and the server, in general terms: enough to judge the figures by."""

from __future__ import annotations

import os
import platform
from typing import Any

import redis as redis_py

from replay.connect import connect


def describe(url: str) -> dict[str, Any]:
    """Cores, processor, how busy it is already, versions and the server's durability settings."""
    client = connect(url)
    info: Any = client.info()
    options: dict[str, str] = {}
    for name in ("appendonly", "appendfsync"):
        found: Any = client.config_get(name)
        options |= found
    client.close()
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": _processor(),
        "load_at_start": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "redis": str(info["redis_version"]),
        "redis_py": redis_py.__version__,
        **options,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), platform.machine())
    except OSError:
        return platform.machine()
