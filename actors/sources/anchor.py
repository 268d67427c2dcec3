"""Anchor data: captioned pictures, each a pure function of (seed, batch, row) or of (split, row) when held out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from actors.config import DataConfig
from actors.sources.prompts import split_of
from diffusion.families.glyph import signs
from diffusion.seeds import key

Batch = tuple[list[str], np.ndarray]
"""Captions and uint8 pixels `[rows, H, W, 3]`."""


@lru_cache(maxsize=4)
def _folder(path: str) -> tuple[tuple[Path, str], ...]:
    root = Path(path)
    try:
        lines = (root / "metadata.jsonl").read_text().splitlines()
        rows = tuple((root / record["file_name"], str(record["text"])) for record in map(json.loads, filter(str.strip, lines)))
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"anchor folder {path} needs a metadata.jsonl with file_name and text on each line: {error}") from None
    if not rows:
        raise ValueError(f"anchor folder {path} lists no pictures")
    return rows


def _one(config: DataConfig, split: str, rng: np.random.Generator, height: int, width: int) -> tuple[str, np.ndarray]:
    for _ in range(100_000):
        if config.kind == "glyph":
            target = signs.draw_target(rng)
            if split_of(caption := signs.prompt_of(target)) == split:
                return caption, signs.render_sign(target, rng, height, width)
        else:
            rows = _folder(str(config.path))
            file, caption = rows[int(rng.integers(len(rows)))]
            if split_of(caption) == split:
                try:
                    with Image.open(file) as image:
                        return caption, np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC))
                except OSError as error:
                    raise ValueError(f"anchor picture {file} cannot be read: {error}") from None
    raise ValueError(f"anchor data has no captions in the {split} split; add pictures")


def _stack(rows: Iterator[tuple[str, np.ndarray]]) -> Batch:
    captions, pixels = zip(*rows, strict=True)
    return list(captions), np.stack(pixels)


def training_batch(config: DataConfig, seed: int, batch: int, rows: int, height: int, width: int) -> Batch:
    """Anchor batch `batch` of the run `seed`, from the train split; caption dropout applied."""

    def draw(row: int) -> tuple[str, np.ndarray]:
        rng = np.random.default_rng(key(seed, "anchor", batch, row))
        dropped = rng.uniform() < config.caption_dropout
        caption, pixels = _one(config, "train", rng, height, width)
        return "" if dropped else caption, pixels

    return _stack(draw(row) for row in range(rows))


def held_out_batch(config: DataConfig, split: str, rows: int, height: int, width: int) -> Batch:
    """`rows` pictures of `split`, the same for every run."""
    return _stack(_one(config, split, np.random.default_rng(key("held-out", split, row)), height, width) for row in range(rows))
