"""The command line, `ddrl`. A person's mistake is one clear line and exit status 2; a run that failed, 1."""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.exits import fail as _fail
from trainer.cli.replay import app as replay
from trainer.cli.rewards import add_to
from trainer.cli.sample import sample
from trainer.config.composition import composition
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.render import render_config
from trainer.run.environment import prepare

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Data-regularized reinforcement learning of diffusion models.")

app.add_typer(replay, name="replay")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ddrl {version('ddrl')}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[bool, typer.Option("--version", callback=_show_version, is_eager=True, help="print the version and leave")] = False,
) -> None:
    """Data-regularized reinforcement learning of diffusion models."""


Recipe = Annotated[Path, typer.Argument(help="recipe, a YAML file", show_default=False)]
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)]


@app.command()
def config(recipe: Recipe, set_: Overrides = None) -> None:
    """Print the resolved configuration, with a comment for each key."""
    try:
        typer.echo(render_config(load_config(recipe, set_)), nl=False)
    except ConfigError as error:
        _fail(str(error), 2)


@app.command()
def train(
    recipe: Recipe,
    set_: Overrides = None,
    run_dir: Annotated[Path | None, typer.Option(help="folder of the run [default: runs/NAME]", show_default=False)] = None,
    resume: Annotated[bool, typer.Option(help="go on with the run in the folder")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; without it a local one is started", show_default=False)] = None,
) -> None:
    """Train: start what is missing, join what is given, clean up at the end. Ctrl-C checkpoints and stops."""
    try:
        overrides = list(set_ or []) + ([f"ray.address={ray_address}"] if ray_address else [])
        settings = load_config(recipe, overrides)
    except ConfigError as error:
        _fail(str(error), 2)

    prepare(settings.ray.address)
    from rich.console import Console

    from trainer.report.display import Display
    from trainer.run.driver import Driver, Interrupted, absolute
    from trainer.run.errors import RunFailed, describe
    from trainer.run.folder import RunFolder
    from trainer.run.quiet import output_to

    folder = RunFolder(run_dir or Path("runs") / settings.name)
    settings = absolute(settings)
    try:
        folder.open(settings, resume)
        title = f"{composition(settings.objective)}, seed {settings.seed}, {folder.path}"
        terminal = Console(file=sys.stdout)  # held from before the output of libraries is sent elsewhere
        with Display(settings.updates, settings.name, title=title, console=terminal) as display:
            with output_to(folder.path / "ray.log"):
                summary = Driver(settings, folder, display, resume).run()
            display.finish(summary)
        typer.echo(f"report: {folder.path / 'report.html'}")
    except ConfigError as error:
        _fail(str(error), 2)
    except RunFailed as error:
        _fail(str(error), 1)
    except Interrupted as error:
        typer.echo(f"ddrl: {error}", err=True)
        raise typer.Exit(130) from None
    except KeyboardInterrupt:
        _fail(f"aborted; {folder.path} keeps the last registered checkpoint", 130)
    except OSError as error:
        _fail(f"{folder.path}: {error.strerror or describe(error)}", 1)
    finally:
        folder.forget_failed_start()
        folder.close()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run folders; the first is the reference", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="file to write [default: report.html in the first run, or comparison.html]", show_default=False)] = None,
) -> None:
    """Write the offline HTML report of one run, or a comparison of several, and print the comparison."""
    from trainer.report.comparison import comparison_table
    from trainer.report.page import write_report

    missing = [str(r) for r in runs if not r.is_dir()]
    if missing:
        _fail(f"no such run folder: {', '.join(missing)}", 2)
    if len(runs) > 1:
        typer.echo(comparison_table(runs))
    target = out or runs[0] / ("report.html" if len(runs) == 1 else "comparison.html")
    typer.echo(f"report: {write_report(runs, target)}")


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="run folder", show_default=False)],
    out: Annotated[Path, typer.Argument(help="folder to write, in diffusers' layout", show_default=False)],
    ema: Annotated[bool, typer.Option(help="the moving average instead of the raw weights")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what the folder holds")] = False,
) -> None:
    """Copy the newest exported policy of a run, with the run's recipe and curve beside it."""
    from trainer.cli.export import ExportError, export_run

    try:
        typer.echo(f"policy: {export_run(run, out, ema, overwrite)}")
    except ExportError as error:
        _fail(str(error), 2)


app.command()(sample)
add_to(app)


def main() -> None:
    """Entry point of the console script."""
    app()
