"""``rewards.yaml``: a whole fleet in one file.

``read_fleet(path)`` gives a ``FleetConfig`` or one clear line about what is wrong with the file. A file describes a fleet to start,
so it names at least one reward and no ``url``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from services.config import FleetConfig, FleetConfigError, one_line
from services.unique_keys import UniqueKeys


def read_fleet(path: Path) -> FleetConfig:
    """Read a ``rewards.yaml``; relative paths in it start from its folder. Raises ``FleetConfigError``."""
    try:
        tree = yaml.load(path.read_text(), UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise FleetConfigError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise FleetConfigError(f"{path} is not a text file") from None
    except yaml.YAMLError as error:
        raise FleetConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return parse_fleet(tree).located(path.parent)
    except FleetConfigError as error:
        raise FleetConfigError(f"{path}: {error}") from None


def parse_fleet(tree: Any) -> FleetConfig:
    """A fleet to start from a tree of plain values, such as YAML gives or ``FleetConfig.model_dump`` made. Raises ``FleetConfigError``."""
    if not isinstance(tree, dict) or not isinstance(tree.get("rewards"), dict):
        raise FleetConfigError("a fleet is a mapping with 'rewards:', a mapping of names to settings such as {ocr: {kind: ocr}}")
    try:
        config = FleetConfig.model_validate(tree)
    except ValidationError as error:
        raise FleetConfigError(one_line(error, FleetConfig)) from None
    if not config.rewards:
        raise FleetConfigError("rewards: name at least one, such as {ocr: {kind: ocr}}")
    if config.url is not None:
        raise FleetConfigError(f"url ({config.url}) is for runs that ask a service which already runs; a fleet to start has none")
    return config
