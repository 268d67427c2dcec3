"""`ddrl replay …`: look at a run's ledger, audit it, and act on what one finds.

Looking never changes anything. `audit` leaves with status 1 when it finds something; a mistake, or a ledger that cannot
be reached, is one line and status 2. Passwords are never shown.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainer.cli.exits import fail

if TYPE_CHECKING:
    from replay.buffer import ReplayBuffer
    from trainer.cli.replay_target import Ledger

app = typer.Typer(no_args_is_help=True, help="Look at the replay buffer's ledger: a run folder, or --url of its Redis (and --run).")

Folder = Annotated[Path | None, typer.Argument(help="run folder", show_default=False)]
GroupsAndFolder = Annotated[list[str], typer.Argument(metavar="GROUP... [FOLDER]", help="group indices; anything else is the run folder", show_default=False)]
Url = Annotated[str | None, typer.Option(envvar="DDRL_REDIS_URL", show_envvar=True, help="Redis of the run, redis://…", show_default=False)]
Run = Annotated[str | None, typer.Option(help="the run's name, where the server holds several", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


@contextmanager
def _ledger(folder: Path | None, url: str | None, run: str | None) -> Iterator[Ledger]:
    """The ledger that is meant; every expected error becomes one line and status 2."""
    from replay.errors import ReplayError
    from trainer.cli.replay_target import TargetError, ledger

    try:
        with ledger(folder, url, run) as found:
            yield found
    except (TargetError, ReplayError) as error:
        fail(str(error), 2)


def _attach(found: Ledger) -> ReplayBuffer:
    from replay.buffer import ReplayBuffer

    return ReplayBuffer.attach(found.client, found.run)


WIDE = 140
"""Columns that every table fits in."""


def _show(renderable: Any) -> None:
    """Print a table: as wide as the terminal; into a pipe or file as wide as it needs, so that no row is broken."""
    from rich.console import Console

    console = Console(file=sys.stdout)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = WIDE
    console.print(renderable)


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=1))


def _split(words: list[str]) -> tuple[list[int], Path | None]:
    """Indices and, if one is named, the run folder."""
    groups = [int(word) for word in words if word.isdecimal()]
    others = [word for word in words if not word.isdecimal()]
    if len(others) > 1:
        fail(f"one run folder at a time, and groups are numbers: {' '.join(others)}", 2)
    if not groups:
        fail("which group? Give its index, a number from 0", 2)
    return groups, Path(others[0]) if others else None


@app.command()
def status(folder: Folder = None, url: Url = None, run: Run = None, as_json: Json = False) -> None:
    """The run at a glance: groups by state, budgets, claims, live groups."""
    from replay.inspection import inspect
    from trainer.cli.replay_tables import status as table

    with _ledger(folder, url, run) as found:
        view = inspect(found.client, found.run)
        if as_json:
            counts = _attach(found).counts()
            live = [asdict(group) for group in view.live.values()]
            claims, data = [asdict(claim) for claim in view.claims], [asdict(batch) for batch in view.data]
            _print_json({"run": view.run, "counts": counts, "numbers": view.numbers, "live": live, "claims": claims, "data": data})
            return
        _show(table(view))


@app.command()
def inspect(words: GroupsAndFolder, url: Url = None, run: Run = None, as_json: Json = False) -> None:
    """Everything the ledger knows about some groups, finished ones too."""
    from replay.inspection import inspect as look
    from trainer.cli.replay_tables import inspected

    groups, folder = _split(words)
    with _ledger(folder, url, run) as found:
        view = look(found.client, found.run)
    views = [view.group(group) for group in groups]
    if as_json:
        _print_json([asdict(group) for group in views])
    else:
        for group in views:
            _show(inspected(view, group))
    unopened = [str(group.group) for group in views if group.state == "unopened"]
    if unopened:
        fail(f"not opened yet: {', '.join(unopened)}; the run has {view.numbers.get('next_group', 0)} groups so far", 2)


@app.command()
def audit(folder: Folder = None, url: Url = None, run: Run = None, as_json: Json = False) -> None:
    """Is every group accounted for exactly once? Status 1 and the findings if not."""
    from replay.inspection import inspect as look

    with _ledger(folder, url, run) as found:
        findings = _attach(found).audit()
        view = look(found.client, found.run)
    states = {state: view.count(state) for state in ("leased", "waiting", "ready", "claimed", "settled", "evicted", "dead")}
    if as_json:
        _print_json({"run": view.run, "clean": not findings, "findings": findings, "opened": view.numbers.get("next_group", 0), "groups": states})
    else:
        told = ", ".join(f"{count} {state}" for state, count in states.items() if count) or "none opened"
        for finding in findings:
            typer.echo(f"finding: {finding}")
        verdict = f"{len(findings)} finding{'s' * (len(findings) != 1)}" if findings else "clean"
        typer.echo(f"audit of run {view.run}: {verdict}; {view.numbers.get('next_group', 0)} groups: {told}")
    if findings:
        raise typer.Exit(1)


@app.command()
def dead(folder: Folder = None, url: Url = None, run: Run = None, as_json: Json = False) -> None:
    """Groups whose every attempt failed, and why."""
    from replay.inspection import inspect as look
    from trainer.cli.replay_tables import dead as table

    with _ledger(folder, url, run) as found:
        view = look(found.client, found.run)
    if as_json:
        letters = [{"group": g, "failures": view.failures.get(g, []), "requeued": g in view.requeued} for g in sorted(view.ended["dead"])]
        _print_json({"run": view.run, "dead": letters})
    else:
        _show(table(view))


@app.command()
def requeue(words: GroupsAndFolder, url: Url = None, run: Run = None, as_json: Json = False) -> None:
    """Have dead groups made again under their own index, with all their attempts. Status 2 if one is not dead."""
    from replay.inspection import inspect as look

    groups, folder = _split(words)
    with _ledger(folder, url, run) as found:
        buffer = _attach(found)
        done = {group: buffer.requeue(group) for group in groups}
        view = look(found.client, found.run)
    refused = [group for group, accepted in done.items() if not accepted]
    if as_json:
        _print_json([{"group": group, "requeued": accepted, "state": view.group(group).state} for group, accepted in done.items()])
    else:
        when = "when the run goes on (--resume)" if folder is not None and not found.driven else "as soon as a producer asks and a slot is free"
        for group, accepted in done.items():
            if accepted:
                reasons = view.failures.get(group, [])
                why = f"; it died of: {reasons[-1]}" if reasons else ""
                typer.echo(f"group {group}: will be made again instead of the next new index, {when}{why}")
    if refused:
        states = ", ".join(f"group {group} is {view.group(group).state}" for group in refused)
        fail(f"only dead groups can be made again: {states}", 2)


@app.command()
def trim(
    folder: Folder = None,
    url: Url = None,
    run: Run = None,
    as_json: Json = False,
    forget: Annotated[bool, typer.Option("--forget", help="delete the whole ledger of a finished run, payloads and all")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="really (with --forget)")] = False,
) -> None:
    """Delete payloads nobody needs any more; with --forget --yes, the run's whole ledger."""
    from replay.inspection import inspect as look

    with _ledger(folder, url, run) as found:
        buffer = _attach(found)
        if not forget:
            freed = buffer.trim()
            if as_json:
                _print_json({"run": found.run, **freed})
            else:
                typer.echo(f"run {found.run}: deleted {freed['trash']} payloads of ended groups and batches, {freed['orphans']} that no commit adopted")
            return
        view = look(found.client, found.run)
        what = f"the ledger of run {found.run}: {view.numbers.get('next_group', 0)} groups, {len(view.live)} of them not settled"
        if found.driven:
            fail(f"a driver has the run folder of {found.run}: stop it before its ledger is deleted", 2)
        if not yes:
            fail(f"--forget deletes {what}; it cannot be resumed afterwards. Add --yes", 2)
        deleted = buffer.forget()
        if as_json:
            _print_json({"run": found.run, "forgotten": True, "deleted": deleted})
        else:
            typer.echo(f"deleted {what} ({deleted} keys and payloads)")
