"""Sample grids: pictures side by side, each with what it should show."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw


def caption(prompt: str) -> str:
    """What a person compares a sample with: the quoted text, or the start of the prompt."""
    parts = prompt.split('"')
    return parts[1] if len(parts) > 2 else prompt[:24]


def contact_sheet(images: Sequence[np.ndarray] | np.ndarray, captions: Sequence[str], columns: int = 4, width: int = 144) -> Image.Image:
    """Pictures uint8 `[H, W, 3]` in rows, each with its caption below. Sizes may differ: all are enlarged by the same whole
    number, with which the widest stays within `width` pixels, and stand in the middle of their cells."""
    w, h = (max(image.shape[axis] for image in images) for axis in (1, 0))
    scale = max(1, width // w)
    cell_w, cell_h = w * scale + 8, h * scale + 18
    sheet = Image.new("RGB", (columns * cell_w, -(-len(images) // columns) * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (picture, text) in enumerate(zip(images, captions, strict=True)):
        size = picture.shape[1] * scale, picture.shape[0] * scale
        x, y = i % columns * cell_w + 4, i // columns * cell_h + 2
        corner = x + (w * scale - size[0]) // 2, y + (h * scale - size[1]) // 2
        sheet.paste(Image.fromarray(picture).resize(size, Image.Resampling.NEAREST), corner)
        draw.text((x + w * scale / 2, y + h * scale + 1), text, fill="black", anchor="ma")
    return sheet
