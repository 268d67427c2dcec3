"""Sample grids: pictures side by side, each with what it should show."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

CELL = 144
"""Widest that small pictures are enlarged to, in pixels."""
CAPTION_LINES = 3
LINE = 12
"""Height of one line of a caption, in pixels."""


def caption(prompt: str) -> str:
    """What a person compares a sample with: the quoted text, or the whole prompt."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 else prompt


def wrapped(text: str, width: float, measure: Callable[[str], float]) -> list[str]:
    """The text in at most `CAPTION_LINES` lines that `measure` finds no wider than `width`; what does not fit ends in `…`."""
    lines: list[str] = []
    rest = text.split()
    while rest:
        used = next((n for n in range(len(rest), 0, -1) if measure(" ".join(rest[:n])) <= width), 0)
        if used and (len(lines) + 1 < CAPTION_LINES or used == len(rest)):
            lines.append(" ".join(rest[:used]))
            rest = rest[used:]
            continue
        line = " ".join(rest)
        cut = next((n for n in range(len(line), 1, -1) if measure(line[:n].rstrip() + "…") <= width), 1)
        return [*lines, line[:cut].rstrip() + "…"]
    return lines


def contact_sheet(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], columns: int = 4, width: int = CELL) -> Image.Image:
    """Pictures uint8 `[H, W, 3]` in rows, each with its caption below, in as many lines as the longest needs. Sizes may differ:
    all are enlarged by the same whole number, with which the widest stays within `width` pixels, and stand in the middle of
    their cells."""
    w, h = (max(image.shape[axis] for image in images) for axis in (1, 0))
    scale = max(1, width // w)
    cell_w = w * scale + 8
    measure = ImageDraw.Draw(Image.new("RGB", (1, 1))).textlength
    texts = [wrapped(text, cell_w - 2, measure) for text in captions]
    cell_h = h * scale + 6 + LINE * max(1, *(len(text) for text in texts))
    sheet = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(images, texts, strict=True)):
        size = picture.shape[1] * scale, picture.shape[0] * scale
        x, y = i % columns * cell_w + 4, i // columns * cell_h + 2
        corner = x + (w * scale - size[0]) // 2, y + (h * scale - size[1]) // 2
        sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), corner)
        for place, line in enumerate(text):
            draw.text((x + w * scale / 2, y + h * scale + 1 + place * LINE), line, fill="black", anchor="ma")
    return sheet
