"""The glyph world as sources: signs such as `a sign that says "407"`, each with its rendered picture, and numbers that move, each with
its clip."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.sources.example import Example
from diffusion.families.glyph import moving, signs


@dataclass(frozen=True)
class Sign:
    """A picture of `target` in the style that `rng` draws; the generator is copied, so every look is the same."""

    target: str
    rng: np.random.Generator

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        return signs.render_sign(self.target, copy.deepcopy(self.rng), height, width)


class GlyphSource:
    """Endless signs of 2 to 4 digits; the text is the id."""

    def draw(self, rng: np.random.Generator) -> Example:
        target = signs.draw_target(rng)
        text = signs.prompt_of(target)
        return Example(text, text, Sign(target, copy.deepcopy(rng)))


@dataclass(frozen=True)
class MovingNumber:
    """A clip of `number` in motion, in the style that `rng` draws; the generator is copied, so every look is the same."""

    number: str
    direction: str
    rng: np.random.Generator

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        return moving.render_clip(self.number, self.direction, copy.deepcopy(self.rng), height, width)[:frames]


class GlyphVideoSource:
    """Endless clips of numbers of 2 or 3 digits that move left, right, up or down, with captions that may err; the text is the id."""

    def draw(self, rng: np.random.Generator) -> Example:
        number, direction = moving.draw_number(rng)
        text = moving.prompt_of(*moving.captioned(number, direction, rng))
        return Example(text, text, MovingNumber(number, direction, copy.deepcopy(rng)))
