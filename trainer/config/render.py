"""The resolved tree as text that reads back, with what each key means."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml
from pydantic import BaseModel

from trainer.config.composition import composition
from trainer.config.objective import ObjectiveConfig
from trainer.config.run import RunConfig


def _dump(model: BaseModel, indent: int) -> list[str]:
    lines = []
    for name, info in type(model).model_fields.items():
        value = getattr(model, name)
        pad = "  " * indent
        if isinstance(value, BaseModel):
            said = f"{info.description}: {composition(value)}" if isinstance(value, ObjectiveConfig) else info.description
            lines.extend(["", f"{pad}# {said}", f"{pad}{name}:", *_dump(value, indent + 1)])
        else:
            shown = _without_password(model.model_dump(mode="json")[name])
            plain = yaml.safe_dump(shown, default_flow_style=True, width=10_000).strip().removesuffix("\n...").strip()
            lines.append(f"{pad}{name}: {plain}  # {info.description}")
    return lines


def render_config(config: RunConfig, notes: Sequence[str] = ()) -> str:
    """The resolved tree as YAML with a comment for each key; reads back to the same configuration, but for a password in
    `redis.url`, which is never shown or stored. `notes` are lines of comment above it."""
    return "".join(f"# {line}\n" for line in notes) + "\n".join(_dump(config, 0)).lstrip("\n") + "\n"


def _without_password(value: Any) -> Any:
    """A URL without its password, in the authority or in the query; anything else as it is."""
    if not isinstance(value, str):
        return value
    return re.sub(r"([?&]password=)[^&\s]+", r"\1***", re.sub(r"(://[^:/@\s]*:)\S+@", r"\1***@", value))
