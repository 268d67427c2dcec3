"""The machine and the server, in general terms: enough to judge the figures by."""

from __future__ import annotations

from typing import Any

import redis as redis_py

from benchmarks.machine import machine
from replay.connect import connect


def describe(url: str) -> dict[str, Any]:
    """The machine, versions and the server's durability settings."""
    client = connect(url)
    info: Any = client.info()
    options: dict[str, str] = {}
    for name in ("appendonly", "appendfsync"):
        found: Any = client.config_get(name)
        options |= found
    client.close()
    return {**machine(), "redis": str(info["redis_version"]), "redis_py": redis_py.__version__, **options}
