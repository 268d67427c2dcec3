"""The glyph world as a source: signs such as `a sign that says "407"`, each with its rendered picture."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from actors.sources.example import Example
from diffusion.families.glyph import signs


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
