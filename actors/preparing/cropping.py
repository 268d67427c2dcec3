"""An encoded picture to pixels of a stated size: decoded whole or not at all, turned upright, scaled to cover, cropped at the centre."""

from __future__ import annotations

import io
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485
"""Of one picture: where Pillow begins to warn of decompression bombs."""


class BrokenMediaError(ValueError):
    """Bytes that are no picture or clip that can be used; the message says why."""


def decode(data: bytes) -> Image.Image:
    """RGB, whatever the mode: transparency lies on white, 16 bits are scaled to 8. Raises BrokenMediaError."""
    if not data:
        raise BrokenMediaError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise BrokenMediaError(f"{width}x{height} pixels, more than {MAX_PIXELS} (a decompression bomb?)")
            image.load()
            return _rgb(ImageOps.exif_transpose(image))
    except BrokenMediaError:
        raise
    except Exception as error:  # decoders raise whatever they like, and one file must not end the preparation of a million
        text = str(error).replace(repr(error.args[0]), "bytes") if isinstance(error, OSError) and error.args else str(error)
        raise BrokenMediaError("no picture of a known format" if "cannot identify" in text else f"{type(error).__name__}: {text}"[:300]) from None


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    if image.mode == "F":
        raise BrokenMediaError("floating-point pixels, whose range nothing states")
    if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
        return Image.fromarray((np.asarray(image, np.float32).clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    return image.convert("RGB")


def fitted(image: Image.Image, height: int, width: int) -> NDArray[np.uint8]:
    """uint8 `[height, width, 3]`: the largest centred part of that shape, resized (bicubic, antialiased)."""
    return np.asarray(ImageOps.fit(image, (width, height), Image.Resampling.BICUBIC))
