"""PNG, JPEG and WebP: size from the header, then uint8 RGB. Lossless files arrive exactly.

Refused rather than guessed: transparency, animation, more than 8 bits per channel, CMYK. EXIF orientation and colour
profiles are not applied; the pixels are scored as they are stored.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as PILImage

from services.client.base import Media
from services.media.plan import Plan, Refused
from services.problems import ProblemError

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "P", "RGB")


def is_picture(data: bytes) -> bool:
    """By magic bytes; the name and the declared type of a file mean nothing."""
    return data.startswith((b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff")) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def plan_picture(data: bytes) -> Plan:
    """Raises ``Refused`` for what is readable and not accepted, ``ProblemError`` for a decompression bomb."""
    try:
        picture = PILImage.open(io.BytesIO(data), formats=_FORMATS)
    except PILImage.DecompressionBombError:
        raise ProblemError(413, "image_too_large", "a file promises far too many pixels") from None
    if getattr(picture, "n_frames", 1) != 1:
        raise Refused("animated images are not accepted")
    if picture.has_transparency_data:
        raise Refused("the image has transparency; flatten it to RGB first")
    if picture.mode not in _MODES:
        raise Refused(f"pixels of kind {picture.mode} are not accepted; send 8-bit RGB or grey")

    def decode() -> list[Media]:
        return [Media.image(np.asarray(picture.convert("RGB"), np.uint8))]

    return Plan(1, 1, picture.height, picture.width, decode)
