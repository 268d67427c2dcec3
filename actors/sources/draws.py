"""Which example a group, a row of anchor data or a held-out figure has: pure functions of names, whatever the source."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from actors.config import DataConfig, PromptConfig
from actors.sources.example import DRAWS, Example, Source, SourceError, draw_of
from actors.sources.folder import FolderSource
from actors.sources.glyph import GlyphSource, GlyphVideoSource
from actors.sources.ocr_scenes import OCRScenesSource
from actors.sources.prepared import PreparedSource
from actors.sources.text import TextSource
from diffusion.seeds import key

Row = tuple[str, Example]
"""A caption as the policy is shown it, and the example it is of."""
Batch = tuple[list[str], NDArray[np.uint8]]
"""Captions and uint8 pixels `[rows, H, W, 3]` (clips: `[rows, T, H, W, 3]`)."""


def make_source(kind: str, path: str | None, seed: int = 0) -> Source:
    """A source by its kind. Raises SourceError for a file or folder that cannot be used."""
    if kind == "glyph":
        return GlyphSource()
    if kind == "glyph_video":
        return GlyphVideoSource()
    if kind == "ocr_scenes":
        return OCRScenesSource(seed)
    if kind == "prepared":
        return PreparedSource(str(path))
    return TextSource(str(path)) if kind == "file" else FolderSource(str(path))


def prompt_source(prompts: PromptConfig, data: DataConfig) -> Source:
    """Where prompts come from; `prompts.kind: data` means from the anchor data's examples."""
    return data_source(data) if prompts.kind == "data" else make_source(prompts.kind, prompts.path, prompts.seed)


def data_source(data: DataConfig) -> Source:
    """Where anchor data comes from."""
    return make_source(data.kind, data.path)


def listed(source: Source) -> Sequence[Example] | None:
    """Every example of a source that has a list of them; None of one that draws without end."""
    if isinstance(source, PreparedSource):
        return source
    return source.examples if isinstance(source, TextSource | FolderSource) else None


def training_example(source: Source, seed: int, group: int) -> Example:
    """Example of group `group` of the run `seed`, from the train split."""
    return draw_of(source, "train", np.random.default_rng(key(seed, "prompt", group)))


def held_out_examples(source: Source, split: str, n: int) -> list[Example]:
    """`n` examples of `split` with distinct texts, the same for every run. Raises SourceError when the source has fewer."""
    rng = np.random.default_rng(key("held-out", split))
    found: dict[str, Example] = {}
    for _ in range(200 * n + DRAWS):
        example = source.draw(rng)
        if example.split == split:
            found.setdefault(example.text, example)
            if len(found) == n:
                return list(found.values())
    raise SourceError(f"the prompt source has only {len(found)} distinct {split} prompts, {n} were asked for; lower evaluation.*_prompts")


def held_out_prompts(source: Source, split: str, n: int) -> list[str]:
    """Their texts."""
    return [example.text for example in held_out_examples(source, split, n)]


def training_row(source: Source, dropout: float, seed: int, batch: int, row: int) -> Row:
    """Row `row` of anchor batch `batch` of the run `seed`, from the train split; a share `dropout` of the captions is empty."""
    rng = np.random.default_rng(key(seed, "anchor", batch, row))
    dropped = rng.uniform() < dropout
    example = draw_of(source, "train", rng)
    return "" if dropped else example.text, example


def training_rows(source: Source, dropout: float, seed: int, batch: int, rows: int) -> list[Row]:
    """The first `rows` rows of an anchor batch, see `training_row`."""
    return [training_row(source, dropout, seed, batch, row) for row in range(rows)]


def held_out_rows(source: Source, split: str, rows: int) -> list[Row]:
    """`rows` rows of `split`, the same for every run."""
    examples = (draw_of(source, split, np.random.default_rng(key("held-out", split, row))) for row in range(rows))
    return [(example.text, example) for example in examples]


def training_batch(source: Source, dropout: float, seed: int, batch: int, rows: int, height: int, width: int) -> Batch:
    """`training_rows` with their pixels."""
    return _pictured(training_rows(source, dropout, seed, batch, rows), height, width)


def held_out_batch(source: Source, split: str, rows: int, height: int, width: int) -> Batch:
    """`held_out_rows` with their pixels."""
    return _pictured(held_out_rows(source, split, rows), height, width)


def pixels_of(examples: Sequence[Example], height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
    """Their pictures, uint8 `[rows, H, W, 3]`, or clips `[rows, T, H, W, 3]`.

    Args:
        frames: the first so many of clips; None = all of them, or pictures.
    Raises:
        SourceError: media of unequal shapes, pictures where clips are asked for, or a clip that is too short.
    """
    pixels = [example.pixels(height, width, frames) for example in examples]
    if frames is not None:
        pixels = [_first(example, clip, frames) for example, clip in zip(examples, pixels, strict=True)]
    shapes = sorted({picture.shape for picture in pixels})
    if len(shapes) > 1:
        raise SourceError(f"anchor media of different shapes {shapes} stand in one batch; give clips of equal length, or pictures only")
    return np.stack(pixels)


def _first(example: Example, clip: NDArray[np.uint8], frames: int) -> NDArray[np.uint8]:
    if clip.ndim == 3 and frames == 1:
        return clip[None]
    if clip.ndim == 3 or len(clip) < frames:
        found = "a picture" if clip.ndim == 3 else f"a clip of {len(clip)} frames"
        raise SourceError(f"example {example.id!r} is {found}, sampler.frames is {frames}; lower it, or leave the example out")
    return clip[:frames]


def _pictured(rows: Sequence[Row], height: int, width: int) -> Batch:
    captions, examples = zip(*rows, strict=True)
    return list(captions), pixels_of(examples, height, width)
