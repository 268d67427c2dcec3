"""How a command ends when a person must do something: one line on standard error and an exit status."""

from __future__ import annotations

from typing import NoReturn

import typer


def fail(message: str, status: int) -> NoReturn:
    """Print `ddrl: message` on one line and leave with `status` (2: a mistake of the caller, 1: a run that failed)."""
    typer.echo(f"ddrl: {' '.join(message.split())}", err=True)
    raise typer.Exit(status)
