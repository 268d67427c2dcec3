"""Clips as people see them: strips of frames in grids, and mp4 files. One encoder setting for everything that is shown; rewards never see an
encoded clip."""

from __future__ import annotations

import io
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from actors.pictures import CELL, contact_sheet

STRIP = 4
"""Frames of a clip that stand in a grid, the first and the last among them."""
SHOWN = 320
"""Widest frame of a clip that stands beside others, in pixels: of thirty clips at 720p a page shows half a gigabyte so, not eight."""
QUALITY = {"crf": "18", "preset": "medium"}
"""Of x264; its manual calls a rate factor of 17 or 18 visually lossless."""
GIF_WIDTH, GIF_FRAMES = 960, 48
"""Most pixels across an animation, and most frames of it."""


def shown(clip: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """A clip `[F, H, W, 3]` as it stands beside others: no wider than `SHOWN`."""
    frames, height, width, _ = clip.shape
    if width <= SHOWN:
        return clip
    size = SHOWN, max(1, round(height * SHOWN / width))
    small = np.empty((frames, size[1], size[0], 3), np.uint8)
    for frame, target in zip(clip, small, strict=True):
        target[:] = np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BICUBIC))
    return small


def strip(clip: NDArray[np.uint8], frames: int = STRIP) -> NDArray[np.uint8]:
    """Some frames of a clip `[F, H, W, 3]`, evenly spread, side by side: `[H, frames · W, 3]`."""
    places = np.linspace(0, len(clip) - 1, min(frames, len(clip))).round().astype(int)
    return np.concatenate([clip[i] for i in places], 1)


def strip_sheet(clips: Sequence[NDArray[np.uint8]] | NDArray[np.uint8], captions: Sequence[str]) -> Image.Image:
    """`contact_sheet` of clips' strips, in two columns: of four, shrunk to a page, no caption can be read."""
    return contact_sheet([strip(clip) for clip in clips], captions, columns=2, width=STRIP * CELL)


def playing_sheet(clips: NDArray[np.uint8], captions: Sequence[str], columns: int = 4) -> NDArray[np.uint8]:
    """`contact_sheet` of clips `[n, F, H, W, 3]`, frame by frame: `[F, h, w, 3]`."""
    return np.stack([np.asarray(contact_sheet(clips[:, i], captions, columns)) for i in range(clips.shape[1])])


def write_clip(path: Path, clip: NDArray[np.uint8], fps: float) -> None:
    """Write a clip uint8 `[F, H, W, 3]` as mp4 (H.264, 4:2:0, plays in every browser); an odd size gets a black row or column. Visible only
    when complete (rename)."""
    import av

    _, height, width, _ = clip.shape
    even = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))
    partial = path.with_suffix(".partial")
    with av.open(str(partial), "w", format="mp4", options={"movflags": "+faststart"}) as file:  # plays before all of it is there
        stream = file.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001), options=QUALITY)
        stream.width, stream.height, stream.pix_fmt = even.shape[2], even.shape[1], "yuv420p"
        for picture in even:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        file.mux(stream.encode())
    partial.rename(path)


def animated(path: Path) -> tuple[bytes, tuple[int, int]]:
    """A clip of `write_clip` as an animated GIF, for what plays no mp4, and its width and height: with fewer pixels, and every nth frame, where
    it would be large."""
    import av

    pictures: list[Image.Image] = []
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        every, scale = max(1, -(-stream.frames // GIF_FRAMES)), min(1.0, GIF_WIDTH / stream.width)
        size = round(stream.width * scale), max(1, round(stream.height * scale))
        for number, frame in enumerate(file.decode(stream)):
            if number % every == 0:
                pixels = frame.reformat(*size, format="rgb24").to_ndarray()
                pictures.append(Image.fromarray(pixels).quantize())
        assert stream.average_rate is not None  # `write_clip` gave one
        duration = float(1000 * every / stream.average_rate)
    buffer = io.BytesIO()
    pictures[0].save(buffer, "GIF", save_all=True, append_images=pictures[1:], duration=duration, loop=0)
    return buffer.getvalue(), size
