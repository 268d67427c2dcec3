"""The glyph world in motion: prompts such as `the number "407" moving left` and rendered clips of such numbers.

A number is bright on dark ground in two colours of its own. It starts in the middle of the picture, so that a first frame does not tell where it will go,
and moves by whole pixels, `STEP` of its direction from frame to frame, so that every frame of a clip is the one before, shifted, to the bit. Every
clip is a pure function of (number, direction, generator).

Captions of clips are often wrong, and so are these: fifteen digits of a hundred are misread, three directions of ten are wrong (`captioned`). A policy
of such data draws what is asked for often, not always, which leaves a reward something to change.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from diffusion.families.glyph.signs import font, luminance, two_colours

FONT = "DejaVuSans-Bold"
FRAMES = 5
"""Frames of a clip."""
STEP = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
"""Pixels to the right and down from one frame to the next; a number that has gone up or down for a whole clip can still be read."""
MISREAD, MISDIRECTED = 0.15, 0.3
"""Chances that a caption says another digit than the clip shows, and another direction."""
TEMPLATE = 'the number "{}" moving {}'


def prompt_of(number: str, direction: str) -> str:
    return TEMPLATE.format(number, direction)


def draw_number(rng: np.random.Generator) -> tuple[str, str]:
    """A random number of 2 or 3 digits (10 %, 90 %: as many of each kind as there are) and a direction."""
    digits = 2 if rng.uniform() < 0.1 else 3
    return f"{int(rng.integers(10**digits)):0{digits}d}", list(STEP)[int(rng.integers(len(STEP)))]


def captioned(number: str, direction: str, rng: np.random.Generator) -> tuple[str, str]:
    """Number and direction that a caption says of a clip of these: each digit another one with a chance of `MISREAD`, the direction with one
    of `MISDIRECTED`."""
    digits = [(int(digit) + int(rng.integers(1, 10))) % 10 if rng.uniform() < MISREAD else int(digit) for digit in number]
    others = [other for other in STEP if other != direction]
    return "".join(map(str, digits)), others[int(rng.integers(len(others)))] if rng.uniform() < MISDIRECTED else direction


def render_clip(number: str, direction: str, rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Clip of a moving number, uint8 `[FRAMES, height, width, 3]`: digits in cells of equal width, in the middle of the
    picture at first.

    The colours are drawn from `rng`. Luminance of ink and ground differs by at least 0.35, so that every clip can be read.
    """
    cell, face = width * 9 / 40, font(FONT, round(height * 2 / 3))
    ground, ink = sorted(two_colours(rng), key=luminance)
    path = [tuple(step * i for step in STEP[direction]) for i in range(FRAMES)]
    margin = max(abs(step) for place in path for step in place)
    mask = Image.new("L", (width + 2 * margin, height + 2 * margin))
    draw = ImageDraw.Draw(mask)
    for i, character in enumerate(number):
        draw.text((margin + width / 2 + (i - (len(number) - 1) / 2) * cell, margin + height / 2), character, fill=255, font=face, anchor="mm")
    still = np.asarray(mask, np.float64)[..., None] / 255
    alpha = np.stack([still[margin - down :, margin - right :][:height, :width] for right, down in path])
    return np.rint((ground * (1 - alpha) + ink * alpha) * 255).astype(np.uint8)
