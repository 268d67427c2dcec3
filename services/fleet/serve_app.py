"""The fleet for ``serve deploy``, ``serve run`` and a RayService: ``import_path: services.fleet.serve_app:build``.

``args`` is either ``{file: /path/to/rewards.yaml}``, a file that every node can read, or the contents of such a file. Host and
port are Serve's own (``http_options``) and the file's have no effect. As Serve then usually listens where others can reach it,
keys are required (``keys_file``, or ``$DDRL_REWARD_KEYS`` in the runtime environment) unless ``allow_anonymous: true`` says that
whatever stands in front of Serve keeps strangers out; callers must then use one of ``hosts`` as its name.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ray import serve

from services.config import FleetConfigError
from services.fleet.application import build_app
from services.fleet.file import parse_fleet, read_fleet
from services.rest.auth import KEYS_VARIABLE, KeysError


def build(args: dict[str, Any]) -> serve.Application:
    """The application. Raises ``FleetConfigError`` or ``KeysError``."""
    settings = dict(args)
    anonymous = bool(settings.pop("allow_anonymous", False))
    file = settings.pop("file", None)
    if file is not None and settings:
        raise FleetConfigError(f"args holds a file and also {', '.join(settings)}: write those into the file")
    config = parse_fleet(settings) if file is None else read_fleet(Path(str(file)))
    if config.redis_url == "embedded":
        raise FleetConfigError("redis_url 'embedded' is for `ddrl serve` on one machine; give redis://host:port/db, or null for no jobs")
    if config.keys_file is None and not os.environ.get(KEYS_VARIABLE) and not anonymous:
        raise KeysError(f"a deployed fleet needs keys_file or ${KEYS_VARIABLE}; or say allow_anonymous: true and list its names in hosts")
    return build_app(config)
