"""The device that a command was asked to use, tried before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.exits import fail

if TYPE_CHECKING:
    import torch

Device = Annotated[str | None, typer.Option(help="cpu, cuda, … [default: cuda where there is one]", show_default=False)]


def usable(device: str | None) -> torch.device:
    """The device by its name; None = cuda where there is one. Ends the command with status 2 where it cannot be used."""
    import torch

    try:
        where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # unknown; not in this build of torch; not in this machine
        fail(f"--device {device} cannot be used here: {error}", 2)
    return where
