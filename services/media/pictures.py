"""Uploaded bytes → uint8 RGB arrays, with every limit checked before pixels are allocated.

Lifecycle: ``plan`` each file (sniff magic bytes, read only the header) → ``check`` all sizes against the
limits → decode. A limit refuses the whole request; a broken file fails alone. No pickle, no paths, no URLs.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from services.client.base import Image, ScoreFailure
from services.limits import LimitsConfig
from services.problems import ProblemError

IMAGE_INVALID = "image_invalid"

_PIL_FORMATS = ("PNG", "JPEG", "WEBP")
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER_LIMIT = 4096


@dataclass(frozen=True)
class Plan:
    """One file, header read: ``count`` images of ``height`` x ``width``, or ``failure``."""

    count: int
    height: int
    width: int
    decode: Callable[[], Sequence[Image]] | None
    failure: ScoreFailure | None = None


def decode_files(files: Sequence[bytes], limits: LimitsConfig) -> list[Image | ScoreFailure]:
    """All images of all files in order; raises ``ProblemError`` 413 when a limit is exceeded."""
    plans = [plan(data) for data in files]
    check(plans, limits)
    out: list[Image | ScoreFailure] = []
    for p in plans:
        if p.failure is not None or p.decode is None:
            out.append(p.failure or _invalid("no decoder"))
            continue
        try:
            out.extend(p.decode())
        except Exception as error:  # codecs raise many kinds on damaged bytes
            out.extend([_invalid(f"the file is damaged ({type(error).__name__})")] * p.count)
    return out


def check(plans: Sequence[Plan], limits: LimitsConfig) -> None:
    """Refuse a request that would allocate more than ``limits`` allow."""
    items = sum(p.count for p in plans)
    if items > limits.max_items:
        raise ProblemError(413, "too_many_items", f"{items} images, at most {limits.max_items} per request")
    for i, p in enumerate(plans):
        if p.height * p.width > limits.max_pixels:
            raise ProblemError(
                413,
                "image_too_large",
                f"file {i} has {p.height}x{p.width} pixels, at most {limits.max_pixels} per image",
            )
    total = sum(p.count * p.height * p.width for p in plans)
    if total > limits.max_total_pixels:
        raise ProblemError(413, "image_too_large", f"{total} pixels in all, at most {limits.max_total_pixels} per request")


def plan(data: bytes) -> Plan:
    """Sniff ``data`` and read its header only; raises ``ProblemError`` for a decompression bomb."""
    try:
        return _plan_npy(data) if data.startswith(_NPY_MAGIC) else _plan_picture(data)
    except PILImage.DecompressionBombError:
        raise ProblemError(413, "image_too_large", "a file promises far too many pixels") from None
    except Exception as error:
        reason = str(error) if isinstance(error, _Refused) else "not a readable PNG, JPEG, WebP or npy file"
        return Plan(1, 0, 0, None, _invalid(reason))


class _Refused(ValueError):
    """A readable header that asks for something not accepted; the text may go to the client."""


def _invalid(reason: str) -> ScoreFailure:
    return ScoreFailure(IMAGE_INVALID, reason)


def _plan_npy(data: bytes) -> Plan:
    stream = io.BytesIO(data)
    major, _ = np.lib.format.read_magic(stream)
    readers: dict[int, Any] = {
        1: np.lib.format.read_array_header_1_0,
        2: np.lib.format.read_array_header_2_0,
    }
    if major not in readers:
        raise _Refused(f"npy format version {major} is not accepted")
    shape, fortran, dtype = readers[major](stream, max_header_size=_NPY_HEADER_LIMIT)
    if dtype != np.uint8 or fortran or len(shape) not in (3, 4) or shape[-1] != 3 or 0 in shape:
        raise _Refused(f"npy must be uint8 C-order [H, W, 3] or [B, H, W, 3], got {dtype} {list(shape)}")
    batch = shape if len(shape) == 4 else (1, *shape)
    offset, size = stream.tell(), int(np.prod(shape, dtype=object))
    if len(data) - offset != size:
        raise _Refused(f"npy header promises {size} bytes of pixels, the file holds {len(data) - offset}")
    return Plan(
        batch[0],
        batch[1],
        batch[2],
        lambda: list(np.frombuffer(data, np.uint8, offset=offset).reshape(batch)),
    )


def _plan_picture(data: bytes) -> Plan:
    picture = PILImage.open(io.BytesIO(data), formats=_PIL_FORMATS)
    if getattr(picture, "n_frames", 1) != 1:
        raise _Refused("animated images are not accepted")
    if picture.has_transparency_data:
        raise _Refused("the image has transparency; flatten it to RGB first")

    def decode() -> Sequence[Image]:
        return [np.asarray(picture.convert("RGB"), np.uint8)]

    return Plan(1, picture.height, picture.width, decode)
