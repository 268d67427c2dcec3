"""A folder of mixed clips as teams have them: rates, sizes and codecs of several kinds, and eight that are broken, each in its own way."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from tests.mixed_pictures import encoded as picture

FRAMES, FPS = 9, 16.0
"""What is taken of each: a little over half a second."""
BROKEN = {
    "truncated.mp4": "no clip of a known format",
    "text.mp4": "no clip of a known format",
    "empty.mp4": "the file is empty",
    "missing.mp4": "No such file or directory",
    "short.mp4": "it ends after 0.50 s (8 frames); 9 frames at 16 a second need more",
    "picture.png": "no clip of a known format",
    "playlist.mp4": "no clip of a known format",
    "no-caption.mp4": "no caption",
}
"""Broken files by name, and what must be said of them."""
RATES = (16, 24, 30, 8)
KINDS = (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("mov", "mpeg4"), ("mkv", "libx264"))


def levels(number: int, frames: int) -> NDArray[np.uint8]:
    """Grey `[F, H, W, 3]` that grows brighter by 6 a frame, from a level and of a size that follow from `number`."""
    height, width = 32 + 8 * (number % 3), 48 - 8 * (number % 4)
    clip = np.empty((frames, height, width, 3), np.uint8)
    clip[:] = (20 + number % 5 + 6 * np.arange(frames)).reshape(-1, 1, 1, 1)
    return clip


def encoded(clip: NDArray[np.uint8], rate: int = 16, suffix: str = "mp4", codec: str = "libx264", turn: int = 0) -> bytes:
    """A clip as a file; `turn`: degrees counterclockwise by which a player turns it."""
    out = io.BytesIO()
    formats = {"mkv": "matroska"}
    with av.open(out, "w", format=formats.get(suffix, suffix)) as file:
        stream = file.add_stream(codec, rate=Fraction(rate))
        stream.width, stream.height, stream.pix_fmt = clip.shape[2], clip.shape[1], "yuv420p"
        stream.bit_rate = 2_000_000
        if turn:
            stream.set_display_rotation(turn)
        for frame in clip:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode())
    return out.getvalue()


def write_folder(folder: Path, count: int) -> Path:
    """`count` clips with metadata.jsonl, the broken ones spread among them."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count - len(BROKEN)):
        (suffix, codec), rate = KINDS[number % len(KINDS)], RATES[number // 2 % len(RATES)]
        name = f"{number:04d}.{suffix}"
        (folder / name).write_bytes(encoded(levels(number, 2 * rate // 3 + 3), rate, suffix, codec))
        lines.append({"file_name": name, "text": f"clip {number} at {rate}"})
    good = encoded(levels(0, 12))
    bad = {
        "truncated.mp4": good[: len(good) // 2],
        "text.mp4": b"this is a text\n",
        "empty.mp4": b"",
        "short.mp4": encoded(levels(0, 8)),
        "picture.png": picture(3),
        "playlist.mp4": b"ffconcat version 1.0\nfile 0000.mp4\n",
        "no-caption.mp4": good,
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    for i, name in enumerate(BROKEN):
        lines.insert((i + 1) * len(lines) // (len(BROKEN) + 1), {"file_name": name, "text": "" if name == "no-caption.mp4" else f"broken {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
