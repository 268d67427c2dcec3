"""What prompts and anchor data are made of: an example, and where examples come from.

An example's split is a function of its id alone (80 % train, 10 % dev, 10 % test), so no list of held-out examples can drift
away from the training set. A source draws with the generator it is handed and hides nothing random of its own.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

DRAWS = 100_000
"""Draws after which a split counts as empty."""


class SourceError(ValueError):
    """A source that cannot be read or has nothing of what is asked for; the message names the file or the split."""


class Media(Protocol):
    """A picture or clip that can be had in any size; equal pixels every time."""

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        """uint8 RGB `[H, W, 3]`, or `[T, H, W, 3]` of a clip: its first `frames` frames at most, None = all. Raises SourceError."""
        ...


class Latent(Protocol):
    """A clean latent that was made beforehand, in one size."""

    def load(self) -> NDArray[np.float32]:
        """fp32 `[C, h, w]`, or `[C, f, h, w]` of a clip. Raises SourceError."""
        ...


class Frame(Protocol):
    """A frame that was kept beside a latent, in the set's size."""

    def load(self) -> NDArray[np.uint8]:
        """uint8 RGB `[H, W, 3]`. Raises SourceError."""
        ...


@dataclass(frozen=True)
class Example:
    """A text and what it describes: `media`, or the `latent` of a prepared set (of a clip with the pixels of its `first` frame), or nothing where a
    source has texts only. The id names the split."""

    id: str
    text: str
    media: Media | None = None
    latent: Latent | None = None
    first: Frame | None = None

    @property
    def split(self) -> str:
        return split_of(self.id)

    def pixels(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        """Its picture, or the first `frames` frames of its clip at most (None = all), in this size. Raises SourceError when there is none."""
        if self.media is None and self.latent is not None:
            raise SourceError(f"example {self.id!r} is of a prepared set, which holds latents and no pictures")
        if self.media is None:
            raise SourceError(f"example {self.id!r} has a text only, and anchor data needs pictures; set data.kind to glyph, folder or prepared")
        return self.media.load(height, width, frames)


class Source(Protocol):
    """Where examples come from."""

    def draw(self, rng: np.random.Generator) -> Example:
        """An example, drawn with `rng`, of whatever split. Raises SourceError."""
        ...


def split_of(name: str) -> str:
    """`train`, `dev` or `test`, by a hash of an example's id."""
    bucket = hashlib.blake2b(name.encode(), digest_size=4).digest()
    share = int.from_bytes(bucket, "little") / 2**32
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"


def draw_of(source: Source, split: str, rng: np.random.Generator) -> Example:
    """An example of `split`. Raises SourceError when none is found."""
    for _ in range(DRAWS):
        example = source.draw(rng)
        if example.split == split:
            return example
    raise SourceError(f"the source has no example of the {split} split; add examples (a hash of the id puts 80 % into train, 10 % into dev, 10 % into test)")
