"""`ddrl doctor`: can this machine run ddrl, and this recipe? Exit status 0 when nothing is a problem, else 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.recipe import TinyFlag, read_recipe
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig


def doctor(
    recipe: Annotated[Path | None, typer.Argument(help="recipe, a YAML file: also look at what it needs", show_default=False)] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
    tiny: TinyFlag = False,
    json_: Annotated[bool, typer.Option("--json", help="print a list of objects: check, level, found, advice")] = False,
    try_: Annotated[bool, typer.Option("--try/--no-try", help="with a recipe: sample, score and update a few times, about a minute")] = True,
    online: Annotated[bool, typer.Option("--online", help="ask the Hugging Face hub about its token and the recipe's policy")] = False,
) -> None:
    """Look at this machine, and at what a recipe needs: what was found, a line each, and what to do about it."""
    from trainer.doctor.examine import examine
    from trainer.doctor.finding import worst
    from trainer.doctor.render import as_json, lines

    findings = examine(recipe, _read(recipe, set_ or [], tiny), online, try_)
    typer.echo(as_json(findings) if json_ else "\n".join(lines(findings)))
    raise typer.Exit(1 if worst(findings) == "problem" else 0)


def _read(recipe: Path | None, overrides: list[str], tiny: bool) -> RunConfig | ConfigError | None:
    if recipe is None:
        return None
    try:
        return read_recipe(recipe, overrides, tiny, data=False)[0]
    except ConfigError as error:
        return error
