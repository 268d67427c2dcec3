"""`ddrl train`. Exit status: 0 finished, 1 failed, 2 a mistake in command or recipe, 130 stopped by SIGINT, 143 by SIGTERM."""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from diffusion.source import is_hub_id
from trainer.cli.exits import fail
from trainer.cli.recipe import TinyFlag, read_recipe
from trainer.config.composition import composition
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.run.environment import prepare
from trainer.run.errors import RunFailed, describe
from trainer.run.folder import RunFolder
from trainer.run.preflight import absolute, check_files
from trainer.run.signals import Interrupted, StopSignals


def train(
    recipe: Annotated[Path, typer.Argument(help="recipe, a YAML file", show_default=False)],
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the run [default: runs/NAME]", show_default=False)] = None,
    resume: Annotated[bool, typer.Option(help="go on with the run in the folder")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; without it a local one is started", show_default=False)] = None,
    tiny: TinyFlag = False,
) -> None:
    """Train: start what is missing, join what is given, clean up at the end. Ctrl-C and SIGTERM checkpoint and stop."""
    signals = StopSignals()
    signals.install()
    folder: RunFolder | None = None
    try:
        overrides = list(set_ or []) + ([f"ray.address={ray_address}"] if ray_address else [])
        if tiny:
            prepare(load_config(recipe, overrides).ray.address)  # before torch draws anchor data
        with signals.held():  # torch has threads
            settings, notes = read_recipe(recipe, overrides, tiny, run_dir)
        folder = RunFolder(run_dir or Path("runs") / settings.name)
        check_files(settings)
        settings = absolute(settings)
        if is_hub_id(settings.model.path):
            check_files(settings)  # again: its files are here now
        for line in notes:
            typer.echo(line)
        _run(settings, folder, signals, resume, notes)
        typer.echo(f"report: {folder.path / 'report.html'}")
    except ConfigError as error:
        fail(str(error), 2)
    except Interrupted as error:
        typer.echo(f"ddrl: {error}", err=True)
        raise typer.Exit(error.status) from None
    finally:
        if folder is not None:
            folder.close()


def _run(settings: RunConfig, folder: RunFolder, signals: StopSignals, resume: bool, notes: list[str]) -> None:
    """Open the folder, run, show the summary. What libraries print goes to ray.log."""
    folder.open(settings, resume, notes)
    try:
        prepare(settings.ray.address)
        with ExitStack() as stack:
            with signals.held():  # these libraries have threads
                from rich.console import Console

                from trainer.report.display import Display
                from trainer.run.driver import Driver
                from trainer.run.quiet import output_to

                title = f"{composition(settings.objective)}, seed {settings.seed}, {folder.path}"
                terminal = Console(file=sys.stdout)  # held from before the output of libraries is sent elsewhere
                display = stack.enter_context(Display(settings.updates, settings.name, title=title, console=terminal))
            with output_to(folder.path / "ray.log"):
                summary = Driver(settings, folder, display, signals, resume).run()
            display.finish(summary)
    except Interrupted as error:
        folder.mark_end("interrupted", str(error), error.status)
        raise
    except RunFailed as error:
        fail(str(error), 1)
    except OSError as error:
        message = f"{folder.path}: {error.strerror or describe(error)}"
        folder.mark_end("failed", message, 1)
        fail(message, 1)
