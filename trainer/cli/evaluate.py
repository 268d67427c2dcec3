"""`ddrl eval`: held-out numbers of policies side by side. A person's mistake is one line and exit status 2; an evaluation that failed, 1."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.exits import fail
from trainer.cli.policy import PolicySource, policy_beside, policy_source
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.run.environment import prepare
from trainer.run.errors import RunFailed
from trainer.run.preflight import absolute, check_files
from trainer.run.signals import Interrupted, StopSignals

if TYPE_CHECKING:
    from trainer.run.evaluating import Candidate

START = "start"
"""Name of the policy that everything is held against."""


def exports_of(run: Path) -> list[Path]:
    """Complete exports of a run, by step, raw ones before averaged ones."""
    return sorted(f for f in (run / "exports").glob("step-*") if f.suffix != ".partial")


def named(sources: list[tuple[Path, PolicySource]]) -> list[tuple[str, PolicySource]]:
    """Sources with a name each that makes a folder: `RUN-step-000100`, `FOLDER`; two of one name get a number."""
    found: list[tuple[str, PolicySource]] = []
    for where, source in sources:
        policy = Path(source.path)
        run = policy.parent.parent.name if policy.parent.name == "exports" else ""
        name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, (run, policy.name if source.weights != "start" else where.stem))))
        taken = {one for one, _ in found} | {START}
        found.append((next(n for n in (name, *(f"{name}-{i}" for i in range(2, len(sources) + 3))) if n not in taken), source))
    return found


def settings_of(start: PolicySource, source: PolicySource) -> RunConfig:
    """The first source's settings with another policy in the place of its own; its adapter, if it had one, is merged."""
    return start.config.model_copy(update={"model": source.config.model})


def eval_(
    sources: Annotated[
        list[Path],
        typer.Argument(help="runs, exported policies or recipes; the first gives the settings, and what it starts from is the reference", show_default=False),
    ],
    out: Annotated[Path, typer.Option(help="folder of the results; what it holds already is not made again", show_default=False)],
    all_: Annotated[bool, typer.Option("--all", help="of a run every export that it holds, also averaged ones, not the newest alone")] = False,
    ray_address: Annotated[str | None, typer.Option(help="Ray cluster to join; without it a local one is started", show_default=False)] = None,
    deadline_s: Annotated[float, typer.Option(min=1, help="seconds that one policy may take")] = 7200.0,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
) -> None:
    """Evaluate policies on the same held-out prompts, noise and loss points, and compare them: rewards, diffusion loss, diversity, grids, a report."""
    from rich.console import Console

    from trainer.report.comparison import comparison_table
    from trainer.report.page import write_report
    from trainer.run.evaluating import evaluate
    from trainer.run.quiet import output_to

    signals = StopSignals()
    signals.install()
    overrides = ["evaluation.every=0", *(set_ or []), *([f"ray.address={ray_address}"] if ray_address else [])]
    try:
        candidates = _candidates(sources, all_, overrides)
        prepare(candidates[0].config.ray.address)
        out.mkdir(parents=True, exist_ok=True)
        terminal = Console(file=sys.stdout)  # held from before the output of libraries is sent elsewhere
        with output_to(out / "ray.log"):
            _, *folders = evaluate(candidates, out, signals, lambda text: terminal.print(text, markup=False, highlight=False, soft_wrap=True), deadline_s)
        typer.echo(comparison_table(folders))
        typer.echo(f"report: {write_report(folders, out / 'report.html')}")
    except ConfigError as error:
        fail(str(error), 2)
    except RunFailed as error:
        fail(str(error), 1)
    except OSError as error:
        fail(f"{out}: {error.strerror or error}", 1)
    except Interrupted as error:
        typer.echo(f"ddrl: {error}; the same command goes on", err=True)
        raise typer.Exit(error.status) from None


def _candidates(sources: list[Path], every: bool, overrides: list[str]) -> list[Candidate]:
    """The policy that the first source starts from, and all that are named. Raises ConfigError."""
    from trainer.run.evaluating import Candidate

    places: list[Path] = []
    for source in sources:
        exports = exports_of(source) if every and source.is_dir() else []
        places += exports or [source]
    start = _start(sources[0], overrides)
    found = [Candidate(START, start.config, 0)]
    for name, policy in named([(place, policy_beside(place, start.config, overrides)) for place in places]):
        if policy.path != start.path:
            found.append(Candidate(name, settings_of(start, policy), policy.step or 1))
    if len(found) == 1:
        raise ConfigError(f"{sources[0]} names its own starting policy alone; give a run, or an exported policy, beside it")
    for candidate in found:
        check_files(candidate.config)
    return [Candidate(c.name, absolute(c.config), c.step) for c in found]


def _start(first: Path, overrides: list[str]) -> PolicySource:
    """What the first source was trained from."""
    if first.is_dir() and (first / "config.yaml").exists():
        return _of_recipe(first / "config.yaml", overrides)
    recipe = first.parent.parent / "config.yaml"
    if first.is_dir():
        if first.parent.name != "exports" or not recipe.exists():
            raise ConfigError(f"{first} does not tell its settings; name a run, an export within one, or a recipe first")
        return _of_recipe(recipe, overrides)
    return policy_source(first, overrides)


def _of_recipe(recipe: Path, overrides: list[str]) -> PolicySource:
    """A run's own recipe, with the policy that it started from."""
    return PolicySource(load_config(recipe, overrides), None, "start")
