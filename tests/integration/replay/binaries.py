"""The redis-server binaries the contract tests run on: the wheel's and PATH's, or the one DDRL_REDIS_SERVER names."""

import os
import shutil
from pathlib import Path

from replay.embedded import _wheel_server

WHEEL = _wheel_server()
CHOSEN = os.environ.get("DDRL_REDIS_SERVER")
BINARIES = [Path(found) for found in ([CHOSEN] if CHOSEN else [WHEEL, shutil.which("redis-server")]) if found]


def name_of(binary: Path) -> str:
    """Shown in test names."""
    return "chosen" if CHOSEN else "wheel" if str(binary) == WHEEL else "path"
