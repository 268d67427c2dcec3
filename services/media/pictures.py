"""PNG, JPEG and WebP: size from the header, then uint8 RGB. Lossless files arrive exactly.

Refused rather than guessed: transparency, animation, more than 8 bits per channel, CMYK. EXIF orientation and colour
profiles are not applied; the pixels are scored as they are stored.
"""

from __future__ import annotations

import io

import numpy as np
from PIL import Image as PILImage

from services.errors import ProblemError
from services.media.base import Media
from services.media.plan import Plan, Refused

_FORMATS = ("PNG", "JPEG", "WEBP")
_MODES = ("1", "L", "P", "RGB")
_PNG = b"\x89PNG\r\n\x1a\n"
_JPEG = b"\xff\xd8\xff"
# Far beyond what encoders write. Every part of a file costs the reader time, every scan of a JPEG a pass over the picture.
_MAX_CHUNKS, _MAX_MARKERS, _MAX_SCANS = 20_000, 65_536, 64


def is_picture(data: bytes) -> bool:
    """By magic bytes; the name and the declared type of a file mean nothing."""
    return data.startswith((_PNG, _JPEG)) or (data[:4] == b"RIFF" and data[8:12] == b"WEBP")


def plan_picture(data: bytes) -> Plan:
    """Raises ``Refused`` for what is readable and not accepted, ``ProblemError`` for a decompression bomb."""
    _check_structure(data)
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


def _check_structure(data: bytes) -> None:
    """Refuse a PNG of countless chunks and a JPEG of countless markers or scans. Raises ``Refused``."""
    if data.startswith(_PNG):
        at, count = len(_PNG), 0
        while at + 8 <= len(data):
            at += 12 + int.from_bytes(data[at : at + 4], "big")
            count += 1
            if count > _MAX_CHUNKS:
                raise Refused(f"a PNG may have {_MAX_CHUNKS} chunks")
    elif data.startswith(_JPEG):
        # In a scan 0xff is followed by 0x00 or a restart marker, so 0xffda counts scans. The reader's every step outside of
        # them takes a 0xff, of which compressed pixels hold less than one in a hundred bytes.
        if data.count(b"\xff\xda") > _MAX_SCANS:
            raise Refused(f"a JPEG may have {_MAX_SCANS} scans")
        if data.count(b"\xff") > _MAX_MARKERS + len(data) // 64:
            raise Refused("the JPEG has too many markers")
