"""`ddrl sample`: draw pictures with the policy of a recipe, a run or an export, prompts from a file, any mix of sizes and step counts.

A person's mistake is one line and exit status 2; a sample that could not be drawn, 1.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from trainer.cli.device import Device, usable
from trainer.cli.exits import fail
from trainer.cli.policy import PolicySource, policy_source
from trainer.cli.recipe import TinyFlag
from trainer.config.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from actors.sources.example import Example
    from diffusion.engine.generate import Sample, SamplingParams

GRID_SAMPLES = 64
"""Samples that the grid shows; all are in the folder."""


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """`16x48,32x96` to (height, width) pairs. Raises ValueError."""
    try:
        sizes = [tuple(int(side) for side in size.split("x")) for size in text.split(",")]
    except ValueError:
        sizes = []
    if not sizes or any(len(s) != 2 or min(s) < 1 for s in sizes):
        raise ValueError(f"--size {text}: give HEIGHTxWIDTH in pixels, several separated by commas, e.g. 16x48,32x96")
    return [(s[0], s[1]) for s in sizes]


def parse_steps(text: str) -> list[int]:
    """`8,20` to step counts. Raises ValueError."""
    if not all(part.isdecimal() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"--steps {text}: give numbers of denoising steps, several separated by commas, e.g. 8,20")
    return [int(part) for part in text.split(",")]


Drawn = TypeVar("Drawn")


def spread(prompts: Sequence[Drawn], choices: Sequence[SamplingParams], n: int) -> list[tuple[Drawn, SamplingParams]]:
    """`n` samples that cover prompts and choices evenly: sample i takes prompt i mod P, and the next choice each time the
    prompts have come round."""
    return [(prompts[i % len(prompts)], choices[i // len(prompts) % len(choices)]) for i in range(n)]


def sample(
    source: Annotated[Path, typer.Argument(help="a run folder (its newest export), an exported policy, or a recipe (what it starts from)", show_default=False)],
    prompts: Annotated[Path, typer.Option(help="file of prompts, one a line; or a folder with a metadata.jsonl, of pictures or clips", show_default=False)],
    given: Annotated[
        Path | None,
        typer.Option(help="picture or clip that all begin with (image-, video-to-video) [default: those of the folder]", show_default=False),
    ] = None,
    given_frames: Annotated[
        int | None, typer.Option(min=0, help="latent frames of it that are given [default: as many as the recipe gives at most]", show_default=False)
    ] = None,
    size: Annotated[str | None, typer.Option(help="HEIGHTxWIDTH in pixels, several separated by commas [default: the recipe's]", show_default=False)] = None,
    steps: Annotated[str | None, typer.Option(help="denoising steps, several separated by commas [default: sampler.eval_steps]", show_default=False)] = None,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="samples in all, spread over prompts, sizes and steps [default: one each]", show_default=False)
    ] = None,
    noise: Annotated[bool, typer.Option(help="stochastic steps, as in rollouts; without, the ODE")] = False,
    ema: Annotated[bool, typer.Option("--ema", help="of a run: the averaged weights")] = False,
    seed: Annotated[int, typer.Option(help="seed of every noise")] = 0,
    out: Annotated[Path | None, typer.Option(help="folder of the pictures [default: samples/NAME]", show_default=False)] = None,
    device: Device = None,
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="change a setting; may be repeated", show_default=False)] = None,
    tiny: TinyFlag = False,
) -> None:
    """Draw pictures or clips: every mix of sizes and steps in one packed batch. Writes PNG (mp4) files, samples.jsonl and grid.png."""
    try:
        policy = policy_source(source, set_ or [], ema, tiny)
        config = policy.config
        sizes = parse_sizes(size) if size else [(config.sampler.height, config.sampler.width)]
        counts = parse_steps(steps) if steps else [config.sampler.eval_steps]
    except (ConfigError, ValueError) as error:
        fail(str(error), 2)
    folder = out or Path("samples") / config.name
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        fail(f"{folder} is not empty; give another folder with --out", 2)
    try:
        _draw(policy, prompts, given, given_frames, sizes, counts, n, noise, seed, folder, device)
    except OSError as error:
        fail(f"{folder}: {error.strerror or error}", 1)


def given_by(examples: Sequence[Example], choices: Sequence[int], given: Path | None) -> int:
    """Latent frames that are given: as many as the run gives at most, none of texts alone where it has text-to-video, one of a named file at least."""
    return max(max(choices), int(given is not None)) if all(example.media for example in examples) else min(choices)


def examples_of(prompts: Path, given: Path | None) -> list[Example]:
    """What is drawn: the lines of a file, or what a folder lists; `given` is then what all begin with. Raises SourceError."""
    from actors.sources.example import Example, SourceError
    from actors.sources.folder import folder_examples, media_of
    from actors.sources.text import prompt_lines

    found = list(folder_examples(str(prompts))) if prompts.is_dir() else [Example(text, text) for text in prompt_lines(str(prompts))]
    if given is None:
        return found
    if not given.is_file():
        raise SourceError(f"--given {given}: there is no such file")
    return [Example(example.id, example.text, media_of(given)) for example in found]


def _draw(
    source: PolicySource,
    file: Path,
    given: Path | None,
    given_frames: int | None,
    sizes: list[tuple[int, int]],
    counts: list[int],
    n: int | None,
    noise: bool,
    seed: int,
    folder: Path,
    device: str | None,
) -> None:
    from actors.conditioning import first_frames
    from diffusion.checkpoint import load_policy
    from diffusion.engine.engine import StepFailed
    from diffusion.engine.generate import DiffusionEngine, SamplingParams
    from diffusion.engine.request import SamplingFailed
    from diffusion.engine.runner import compile_for_batches
    from diffusion.source import CheckpointError

    config, s = source.config, source.config.sampler
    where = usable(device)
    try:
        examples = examples_of(file, given)
        choices = [
            SamplingParams(h, w, c, 1, seed, s.guidance, s.negative_prompt, s.kernel, s.noise_level, "all" if noise else "none", frames=s.frames)
            for h, w in sizes
            for c in counts
        ]
        plan = spread(examples, choices, n or len(examples) * len(choices))
        policy = load_policy(config.model, where, config.seed)
        latents = given_frames if given_frames is not None else given_by(examples, s.given_choices, given)
        if latents:
            frames = policy.codec.pixel_frames(latents)
            plan = [(example, replace(p, given=first_frames(example, frames, p.height, p.width))) for example, p in plan]
        if config.model.compile:
            compile_for_batches(policy.transformer)
        with DiffusionEngine(policy, s.max_tokens, config.model.dtype) as engine, _progress(len(plan)) as told:
            typer.echo(str(source))
            typer.echo(f"{engine.engine.runner.plan}; {engine.engine.runner.describe()}; {policy.attention.why}")
            started = time.perf_counter()
            done = engine.generate([example.text for example, _ in plan], [choice for _, choice in plan], told)
            seconds, stats = time.perf_counter() - started, engine.stats
    except (SamplingFailed, StepFailed, TimeoutError) as error:
        fail(str(error), 1)
    except (CheckpointError, ValueError) as error:
        fail(str(error), 2)
    pictures = [one for samples in done for one in samples]
    _write(folder, pictures, seed, source, s.fps)
    typer.echo(
        f"{len(pictures)} samples in {seconds:.1f} s: {len(pictures) / seconds:.1f} samples/s, {stats.tokens / seconds:.0f} tokens/s, "
        f"{stats.forwards} forward passes, {stats.occupancy:.0%} of the token budget used"
    )
    typer.echo(f"grid: {folder / 'grid.png'}")


@contextmanager
def _progress(total: int) -> Iterator[Callable[[int, int], None]]:
    """A progress bar of finished samples."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("samples"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(file=sys.stdout)) as bar:
        task = bar.add_task("samples", total=total)
        yield lambda finished, _: bar.update(task, completed=finished)


def _write(folder: Path, samples: list[Sample], seed: int, source: PolicySource, fps: float) -> None:
    """Pictures `0000.png …` or clips `0000.mp4 …`, what each is in samples.jsonl, and the grid."""
    from PIL import Image

    from actors.clips import strip, write_clip
    from actors.pictures import caption, contact_sheet

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, one in enumerate(samples):
        p, clip = one.params, one.image.ndim == 4
        name = f"{i:04d}.{'mp4' if clip else 'png'}"
        if clip:
            write_clip(folder / name, one.image, fps)
        else:
            Image.fromarray(one.image).save(folder / name)
        origin = {"policy": source.path, "step_of_policy": source.step, "weights": source.weights}
        size = {"height": p.height, "width": p.width} | ({"frames": p.frames, "fps": fps} if clip else {})
        lines.append({"file": name, "prompt": one.prompt, **size, "steps": p.steps, "seed": seed, "group": i, **origin})
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = samples[:GRID_SAMPLES]
    images = [strip(s.image) if s.image.ndim == 4 else s.image for s in shown]
    contact_sheet(images, [f"{caption(s.prompt)} · {s.params.steps}" for s in shown], columns=8).save(folder / "grid.png")
