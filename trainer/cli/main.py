"""The command line, `ddrl`. A person's mistake is one clear line and exit status 2; a run that failed, 1."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from trainer.cli.clean import clean
from trainer.cli.data import data, prepare_data
from trainer.cli.doctor import doctor
from trainer.cli.evaluate import eval_
from trainer.cli.exits import fail as _fail
from trainer.cli.plan import plan
from trainer.cli.presample import presample
from trainer.cli.recipe import TinyFlag, read_recipe
from trainer.cli.replay import app as replay
from trainer.cli.rewards import add_to
from trainer.cli.sample import sample
from trainer.cli.train import train
from trainer.config.errors import ConfigError
from trainer.config.render import render_config
from trainer.run.preflight import check_files

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Data-regularized reinforcement learning of diffusion models.")

app.add_typer(replay, name="replay")
app.add_typer(data, name="data")


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
def config(recipe: Recipe, set_: Overrides = None, tiny: TinyFlag = False) -> None:
    """Print the resolved configuration, with a comment for each key; a file that is missing is a mistake."""
    try:
        settings, notes = read_recipe(recipe, set_ or [], tiny)
        check_files(settings)
        typer.echo(render_config(settings, notes), nl=False)
    except ConfigError as error:
        _fail(str(error), 2)


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
    hub_folder: Annotated[bool, typer.Option("--hub-folder", help="add a model card, README.md, as the Hugging Face hub shows it")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace what the folder holds")] = False,
) -> None:
    """Copy the newest exported policy of a run, with the run's recipe and curve beside it."""
    from trainer.cli.export import ExportError, export_run

    try:
        typer.echo(f"policy: {export_run(run, out, ema, overwrite, hub_folder)}")
    except ExportError as error:
        _fail(str(error), 2)


app.command()(train)
app.command()(plan)
app.command()(doctor)
app.command()(sample)
app.command("eval")(eval_)
app.command()(prepare_data)
app.command()(presample)
app.command()(clean)
add_to(app)


def main() -> None:
    """Entry point of the console script."""
    app()
