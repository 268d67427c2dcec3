"""`ddrl prepare-data` and `ddrl data inspect`: anchor data made from pictures and clips as teams keep them, and looked at.

What Ray prints is in OUT.log. A person's mistake is one line and exit status 2; a preparation that failed or found too much broken, 1;
stopped by Ctrl-C, 130. The same command goes on where it was.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trainer.cli.device import Device, usable
from trainer.cli.exits import fail
from trainer.cli.sample import parse_sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.prepared import Manifest

data = typer.Typer(no_args_is_help=True, help="Look at prepared anchor data.")

STORE_SLICES = 8
"""Slices of decoded pictures for which the object store of a local cluster has room, beside those of a codec each."""


def prepare_data(
    source: Annotated[
        Path, typer.Argument(help="folder with metadata.jsonl, WebDataset shards, Parquet files, or a saved datasets folder", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(help="folder of the prepared set", show_default=False)],
    model: Annotated[str, typer.Option(help="policy whose codec makes the latents: a folder in diffusers' layout, or a hub id", show_default=False)],
    size: Annotated[str, typer.Option(help="HEIGHTxWIDTH in pixels: pictures and frames are scaled to cover it and cropped at the centre", show_default=False)],
    frames: Annotated[
        int | None, typer.Option(min=1, help="of clips, for a video policy: how many frames are taken (sampler.frames)", show_default=False)
    ] = None,
    fps: Annotated[
        float | None, typer.Option(min=0.01, max=240, help="of clips: frames a second that are taken (sampler.fps) [default: 16]", show_default=False)
    ] = None,
    image: Annotated[str | None, typer.Option(help="column of the pictures or clips, in a table [default: image, … or video, …]", show_default=False)] = None,
    text: Annotated[str | None, typer.Option(help="column of the captions, in a table [default: text, caption, …]", show_default=False)] = None,
    shard_rows: Annotated[int, typer.Option(min=1, help="inputs of a shard: what is decoded, encoded and written at once; of clips at most")] = 64,
    max_broken: Annotated[float, typer.Option(min=0, max=1, help="share of the inputs that may be broken")] = 0.05,
    workers: Annotated[int, typer.Option(min=1, help="codecs that work at a time, each on a GPU of its own where --device is one")] = 1,
    device: Device = None,
    ray_address: Annotated[str | None, typer.Option(help="cluster to join; SOURCE and OUT must be where its nodes see them", show_default=False)] = None,
) -> None:
    """Make a prepared set, latents and captions, of a source of pictures or clips. Run again after a stop, it goes on."""
    from actors.preparing.pipeline import Preparation, PreparationFailed, begun, prepare
    from actors.preparing.readers import Columns
    from actors.sources.example import SourceError
    from diffusion.config import SamplerConfig
    from diffusion.source import CheckpointError, locate
    from trainer.config.run import RayConfig
    from trainer.run.cluster import start_ray
    from trainer.run.environment import prepare as prepare_environment
    from trainer.run.errors import RunFailed, describe
    from trainer.run.quiet import output_to

    try:
        (height, width), *more = parse_sizes(size)
        if more:
            raise ValueError(f"--size {size}: a set has one size")
        where = device if ray_address and device else usable(device).type  # a cluster may have what this machine lacks
        slices = shard_rows * height * width * 3 * (workers + STORE_SLICES) >> 20 if frames is None else 0  # pixels of clips do not travel
        if frames is None and fps is not None:
            raise ValueError("--fps is of clips: say with --frames how many are taken")
        rate = None if frames is None else fps or SamplerConfig().fps
        ray = RayConfig(address=ray_address, cpus=(os.cpu_count() or 1) + workers, object_store_mb=max(256, slices))
        folder, columns = locate(model).folder.resolve(), Columns(image, text)
        job = Preparation(source.resolve(), out.resolve(), folder, height, width, shard_rows, max_broken, columns, frames, rate)
        work = begun(job)
        with progress("shards") as told, output_to(out.with_name(out.name + ".log")), ExitStack() as stack:
            if work.missing:
                prepare_environment(ray_address)
                start_ray(ray, stack)
            manifest = prepare(work, workers, where, told)
    except (SourceError, CheckpointError, ValueError) as error:
        fail(str(error), 2)
    except RunFailed as error:
        fail(str(error), 1)
    except PreparationFailed as error:
        fail(describe(error), 1)
    except OSError as error:
        fail(f"{error.filename or out}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        fail(f"stopped; the same command goes on with {out}", 130)
    typer.echo(summary(manifest, out))


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of `what`; told how many there are, and of how many."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=Console(file=sys.stdout)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def summary(manifest: Manifest, folder: Path) -> str:
    """What a set has come to, in two lines."""
    splits = ", ".join(f"{count} {split}" for split, count in manifest.splits.items())
    broken = f"{manifest.broken} broken inputs left out (broken.jsonl)" if manifest.broken else "nothing broken"
    return f"{folder}: {manifest.rows} examples ({splits}) in {manifest.shards} shards, {broken}\ndigest {manifest.digest}"


@data.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="SET", help="a prepared set", show_default=False)],
    out: Annotated[Path | None, typer.Option(help="picture to write: a grid of decoded examples", show_default=False)] = None,
    model: Annotated[Path | None, typer.Option(help="policy folder whose codec decodes [default: the one that made the set]", show_default=False)] = None,
    n: Annotated[int, typer.Option("-n", min=1, help="examples of the grid")] = 32,
) -> None:
    """Show what a prepared set holds, and verify its checksums: counts, sizes, captions, what was broken, a grid of pictures."""
    from actors.preparing.inspection import grid, inspection
    from actors.sources.example import SourceError
    from diffusion.source import CheckpointError

    try:
        for line in inspection(folder):
            typer.echo(line)
        if out is not None:
            grid(folder, n, model).save(out)
            typer.echo(f"grid: {out}")
    except (SourceError, CheckpointError) as error:
        fail(str(error), 2)
    except (OSError, ValueError) as error:
        fail(f"{out}: {error}", 2)
