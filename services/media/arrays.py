"""npy files: uint8 RGB arrays, viewed in place and never unpickled.

Without fps: [H, W, 3] is an image, [B, H, W, 3] a batch of images. With fps: [T, H, W, 3] is a clip, [B, T, H, W, 3] a
batch of clips.
"""

from __future__ import annotations

import io
import math
from collections.abc import Collection
from typing import Any

import numpy as np

from services.media.base import Media
from services.media.plan import Plan, Refused, Upload

_MAGIC = b"\x93NUMPY"
_HEADER_BYTES = 4096


def is_npy(data: bytes) -> bool:
    """By magic bytes."""
    return data.startswith(_MAGIC)


def plan_npy(upload: Upload) -> Plan:
    """Raises ``Refused`` unless the header is one of the accepted forms and the file holds exactly its bytes."""
    return plan_pixels(view_npy(upload.data, ("uint8",)), upload.fps, upload.selected)


def view_npy(data: bytes | memoryview, dtypes: Collection[str]) -> np.ndarray[Any, Any]:
    """The array of an npy file, without a copy. Raises ``Refused`` for other dtypes, and unless the file holds exactly its bytes."""
    stream = io.BytesIO(data[: _HEADER_BYTES + 16])
    version = np.lib.format.read_magic(stream)
    readers: dict[tuple[int, int], Any] = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise Refused(f"npy format version {version[0]}.{version[1]} is not accepted")
    shape, fortran, dtype = readers[version](stream, max_header_size=_HEADER_BYTES)
    offset = stream.tell()
    if dtype.name not in dtypes or not dtype.isnative or fortran:
        raise Refused(f"npy must be {' or '.join(dtypes)} in C order")
    size = math.prod(shape) * dtype.itemsize
    if len(data) - offset != size:
        raise Refused(f"the npy header promises {size} bytes, the file holds {len(data) - offset}")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape)


def plan_pixels(pixels: np.ndarray[Any, np.dtype[np.uint8]], fps: float | None, selected: bool) -> Plan:
    """The plan of an array that is there already. Raises ``Refused`` for a shape of no image and no clip."""
    rank = 3 if fps is None else 4
    if pixels.ndim not in (rank, rank + 1) or pixels.shape[-1] != 3 or 0 in pixels.shape:
        form = "[H, W, 3] or [B, H, W, 3]; a clip also needs fps" if fps is None else "[T, H, W, 3] or [B, T, H, W, 3]"
        raise Refused(f"with{'out' if fps is None else ''} fps, pixels must be {form}, got {list(pixels.shape)}")
    batch = pixels if pixels.ndim == rank + 1 else pixels[None]
    frames = batch[:, None] if fps is None else batch
    items, count, height, width, _ = frames.shape
    return Plan(items, count, height, width, lambda: [Media(f, fps, selected) for f in frames])
