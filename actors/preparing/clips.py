"""An encoded clip to the frames that are sampled, of a stated size: the first ones at a stated rate, each turned upright and cropped as
pictures are.

Frame k of the clip that comes out is the one whose time is nearest to k / fps (of two, the earlier), counted from the first frame. So a clip of
another rate keeps its speed: of a faster one frames are left out, of a slower one some stand twice. A clip ends with its last frame, which is
shown for 1 / rate; one that ends before the last wanted time is too short.

In memory are one frame as it was decoded and what has been made of the clip.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.preparing.cropping import MAX_PIXELS, BrokenMediaError, decode, fitted

FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,gif,ogg,flv,asf"
"""Containers that are read: those of clips, and no playlists, which name other files."""

Timed = tuple[Fraction, Any]
"""When a frame is shown, in seconds from the first one, and the frame."""


def decode_clip(data: bytes, height: int, width: int, frames: int, fps: float) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    """uint8 `[frames, height, width, 3]`, and width and height of the clip itself. One frame may be of a picture too.

    Raises:
        BrokenMediaError: no clip, one that cannot be read as far as is needed, or one that is too short.
    """
    if not data:
        raise BrokenMediaError("the file is empty")
    if frames == 1 and (picture := _picture(data)) is not None:
        return fitted(picture, height, width)[None], picture.size
    import av

    try:
        container = av.open(io.BytesIO(data), options={"format_whitelist": FORMATS})
    except (OSError, ValueError, av.FFmpegError):
        raise BrokenMediaError("no clip of a known format") from None
    try:
        with container:
            return _sampled(container, height, width, frames, Fraction(fps).limit_denominator(1001))
    except BrokenMediaError:
        raise
    except Exception as error:  # as of pictures: one file must not end the preparation of a million
        raise BrokenMediaError(f"{type(error).__name__}: {getattr(error, 'strerror', None) or error}"[:300]) from None


def _picture(data: bytes) -> Image.Image | None:
    try:
        return decode(data)
    except BrokenMediaError:
        return None


def _sampled(container: Any, height: int, width: int, frames: int, fps: Fraction) -> tuple[NDArray[np.uint8], tuple[int, int]]:
    if not container.streams.video:
        raise BrokenMediaError("the file holds no pictures")
    stream = container.streams.video[0]
    _bounded(stream.codec_context.width, stream.codec_context.height)
    shown = 1 / Fraction(stream.average_rate or stream.guessed_rate or fps)
    clip = np.empty((frames, height, width, 3), np.uint8)
    placed, count, last, size = 0, 0, None, (0, 0)

    def place(frame: Any, until: Fraction, included: bool) -> None:
        """`frame` where it is the nearest: at the wanted times up to `until`."""
        nonlocal placed, size
        first = placed
        while placed < frames and (placed / fps < until or (included and placed / fps == until)):
            placed += 1
        if placed > first:
            image = frame.to_image()
            upright = image.rotate(frame.rotation, expand=True) if frame.rotation else image
            clip[first:placed], size = fitted(upright, height, width), upright.size

    for time, frame in _timed(container, stream, shown):
        count += 1
        if last is not None:
            place(last[1], (last[0] + time) / 2, included=True)
        last = time, frame
        if placed == frames:
            return clip, size
    if last is None:
        raise BrokenMediaError("the file holds no pictures")
    place(last[1], last[0] + shown, included=False)
    if placed < frames:
        raise BrokenMediaError(f"it ends after {float(last[0] + shown):.2f} s ({count} frames); {frames} frames at {float(fps):g} a second need more")
    return clip, size


def _timed(container: Any, stream: Any, shown: Fraction) -> Iterator[Timed]:
    """Frames in the order they are shown."""
    start: Fraction | None = None
    for number, frame in enumerate(container.decode(stream)):
        _bounded(frame.width, frame.height)
        time = number * shown if frame.pts is None or frame.time_base is None else frame.pts * Fraction(frame.time_base)
        start = time if start is None else start
        yield time - start, frame


def _bounded(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BrokenMediaError(f"frames of {width}x{height} pixels, more than {MAX_PIXELS} (a decompression bomb?)")
