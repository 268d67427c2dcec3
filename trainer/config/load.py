"""Reading a recipe: YAML, then dotted overrides, then the tree. An unknown key is an error that names the nearest real one."""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from services.unique_keys import UniqueKeys
from trainer.config.errors import ConfigError
from trainer.config.presets import COMPOSED
from trainer.config.rewards import RewardTerm
from trainer.config.run import RunConfig


def _field_names(model: type[BaseModel], prefix: str = "") -> list[str]:
    names = []
    for name, info in model.model_fields.items():
        names.append(prefix + name)
        nested = [info.annotation, *(() if get_origin(info.annotation) is dict else get_args(info.annotation))]
        for kind in nested:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                names.extend(_field_names(kind, f"{prefix}{name}."))
    return names


@cache
def all_keys() -> list[str]:
    """Every dotted key of the tree, in order."""
    return _field_names(RunConfig)


def nearest_key(key: str) -> str | None:
    """The real key most like `key`, if any is close."""
    close = difflib.get_close_matches(key, all_keys(), n=1, cutoff=0.6)
    return close[0] if close else None


def _unknown(key: str) -> ConfigError:
    near = nearest_key(key)
    return ConfigError(f"unknown key '{key}'" + (f"; did you mean '{near}'?" if near else "; `ddrl config RECIPE` lists all keys"))


OPEN = ("rewards", "fleet.rewards")
"""Sections whose keys are names of one's own."""


def locate(key: str) -> list[str] | None:
    """Where a dotted key stands in the tree, None for an unknown one. A name under `rewards.` may hold dots itself."""
    if key.startswith("rewards."):
        name, _, leaf = key.removeprefix("rewards.").rpartition(".")
        return ["rewards", name, leaf] if name and leaf in RewardTerm.model_fields else None
    if key.startswith("fleet.rewards."):
        return key.split(".")
    return key.split(".") if key in all_keys() else None


def apply_overrides(tree: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Apply `a.b=value` settings (values are YAML) to a copy of `tree`. Raises ConfigError.

    A preset among them replaces the composition that the file names: what presets set is taken out of the file first.
    """
    result: dict[str, Any] = yaml.safe_load(yaml.safe_dump(tree)) if tree else {}
    if any(item.startswith("objective.preset=") for item in overrides) and isinstance(result.get("objective"), dict):
        result["objective"] = {key: value for key, value in result["objective"].items() if key not in COMPOSED}
    for item in overrides:
        key, separator, text = item.partition("=")
        if not separator or not key:
            raise ConfigError(f"override '{item}' is not of the form key=value")
        path = locate(key)
        if path is None:
            raise _unknown(key)
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"override '{item}': the value is not YAML") from None
        node = result
        *parents, leaf = path
        for parent in parents:
            child = node.get(parent)
            if child is None:
                child = node[parent] = {}
            if not isinstance(child, dict):
                raise ConfigError(f"override '{item}': '{parent}' is not a section in this recipe")
            node = child
        node[leaf] = value
    return result


def _is_key(key: str) -> bool:
    return key in all_keys() or key.startswith(tuple(f"{section}." for section in OPEN))


def _one_line(error: ValidationError) -> ConfigError:
    first = error.errors()[0]
    parts = [str(part) for part in first["loc"]]
    while first["type"] != "extra_forbidden" and parts and not _is_key(".".join(parts)):
        parts.pop()  # places inside a value, and the validator's names of a union's branches
    key = ".".join(parts)
    if first["type"] == "extra_forbidden":
        return _unknown(key)
    message = str(first["msg"]).removeprefix("Value error, ")
    given = f" (got {first['input']!r})" if key and not isinstance(first["input"], dict) else ""
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return ConfigError(f"{key}: {message}{given}{more}" if key else message + more)


def parse_config(tree: dict[str, Any]) -> RunConfig:
    """Validate a tree. Raises ConfigError with one clear line."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise _one_line(error) from None


def load_config(path: Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a recipe and apply overrides. Raises ConfigError."""
    try:
        tree = yaml.load(path.read_text(), UniqueKeys)  # a SafeLoader
    except OSError as error:
        raise ConfigError(f"recipe {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"recipe {path} is not a text file") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"recipe {path} must be a mapping of settings")
    return parse_config(apply_overrides(tree, overrides or []))
