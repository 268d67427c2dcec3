"""`ddrl clean`: removes what killed drivers have left on this machine."""

from __future__ import annotations

import typer


def clean() -> None:
    """End the processes and remove the folders of local Ray clusters whose driver was killed. Running ones stay."""
    from trainer.run.local_ray import sweep

    swept = sweep()
    for folder in swept:
        typer.echo(f"removed {folder}")
    if not swept:
        typer.echo("nothing to remove")
