"""The recipe of a command: as it is written, or tiny."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.config.load import load_config
from trainer.config.run import RunConfig

TinyFlag = Annotated[bool, typer.Option("--tiny", help="swap sizes and weights for ones that two cores run in minutes; --set wins")]


def read_recipe(recipe: Path, overrides: list[str], tiny: bool, folder: Path | None = None, data: bool = True) -> tuple[RunConfig, list[str]]:
    """Settings of a recipe, and lines that say what `--tiny` changed of it.

    Args:
        folder: of the run, None = runs/NAME.
        data: whether anchor data is drawn for a tiny recipe that has a prepared set.

    Raises:
        ConfigError
    """
    if not tiny:
        return load_config(recipe, overrides), []
    from trainer.run.tiny import tiny_config

    made = tiny_config(recipe, overrides, folder, data)
    return made.config, made.table()
