"""The glyph world: prompts such as `a sign that says "407"` and rendered pictures of such signs.

Every sign is a pure function of a seed. Fonts, colours, size and position vary, so diversity is visible: a policy that
collapses to one style shows it. Fonts are the DejaVu family bundled with matplotlib, never the system's.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSansMono-Bold", "DejaVuSerif", "DejaVuSerif-Bold")
TEMPLATE = 'a sign that says "{}"'


@lru_cache(maxsize=256)
def font(name: str, size: int) -> ImageFont.FreeTypeFont:
    """A face of DejaVu in this size, in pixels."""
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{name}.ttf"), size)


def prompt_of(target: str) -> str:
    return TEMPLATE.format(target)


def draw_target(rng: np.random.Generator) -> str:
    """A random target of 2, 3 or 4 digits (10 %, 30 %, 60 %: longer strings are rarer to exhaust and harder to write)."""
    digits = int(rng.choice([2, 3, 4], p=[0.1, 0.3, 0.6]))
    return f"{int(rng.integers(10**digits)):0{digits}d}"


def luminance(colour: np.ndarray) -> float:
    """Rec. 601 luma of RGB `[3]`."""
    return float(colour @ np.array([0.299, 0.587, 0.114]))


def two_colours(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Colours of ground and ink, `[3]` each in 0 … 1, whose luminance differs by at least 0.35."""
    while True:
        ground, ink = rng.uniform(0, 1, (2, 3))
        if abs(luminance(ground - ink)) >= 0.35:
            return ground, ink


def render_sign(target: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Picture of a sign, uint8 `[height, width, 3]`: digits in cells of equal width, centred, in one font and two colours.

    Font, size (two sizes), position (± 1.5 px) and the colours are drawn from `rng`. Luminance of ink and ground
    differs by at least 0.35, so that every sign can be read.
    """
    cell = width / 4.3
    size = round(height * float(rng.choice([0.8, 0.9])))
    face = font(FONTS[int(rng.integers(len(FONTS)))], size)
    shift_x, shift_y = rng.uniform(-1.5, 1.5, 2)
    mask = Image.new("L", (width, height))
    draw = ImageDraw.Draw(mask)
    for i, character in enumerate(target):
        x = width / 2 + (i - (len(target) - 1) / 2) * cell + shift_x
        draw.text((x, height / 2 + shift_y), character, fill=255, font=face, anchor="mm")
    ground, ink = two_colours(rng)
    alpha = np.asarray(mask, np.float64)[..., None] / 255
    return np.rint((ground * (1 - alpha) + ink * alpha) * 255).astype(np.uint8)
