"""Sheets of clips of several runs, playing in step below each other, as one animated GIF: the pictures of docs/results.md.

    python -m benchmarks.clips OUT.gif "before=runs/glyph-video-0/samples/before.mp4" "after=runs/glyph-video-0/samples/after.mp4" --height 132

Sheets of one recipe and seed show the same prompts and noise in the same places.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

LABEL = 16
"""Height of a sheet's name, in pixels."""
COLOURS = 64


def frames_of(path: Path) -> tuple[NDArray[np.uint8], float]:
    """Frames `[F, H, W, 3]` of an mp4 file, and how many a second."""
    with av.open(str(path)) as file:
        stream = file.streams.video[0]
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(stream)])
        return frames, float(stream.average_rate or 1)


def stacked(sheets: Mapping[str, Path], height: int) -> tuple[list[Image.Image], float]:
    """Pictures of the first `height` pixel rows of every sheet below its name, and their number a second. Raises SystemExit for sheets of
    different sizes or lengths."""
    read = {name: frames_of(path) for name, path in sheets.items()}
    kinds = {(frames.shape[0], frames.shape[2], fps) for frames, fps in read.values()}
    if len(kinds) != 1:
        raise SystemExit(f"sheets differ in frames, width or frames a second: {sorted(kinds)}")
    ((count, width, fps),) = kinds
    pictures = []
    for i in range(count):
        picture = Image.new("RGB", (width, len(read) * (LABEL + height)), "white")
        draw = ImageDraw.Draw(picture)
        for place, (name, (frames, _)) in enumerate(read.items()):
            top = place * (LABEL + height)
            draw.text((4, top + 2), name, fill="black")
            picture.paste(Image.fromarray(frames[i, :height]), (0, top + LABEL))
        pictures.append(picture)
    return pictures, fps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("sheets", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--height", type=int, default=132, help="pixel rows of each sheet, from the top")
    options = parser.parse_args()
    pairs = [one.partition("=") for one in options.sheets]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise SystemExit(f"{wrong[0]!r} is not NAME=FILE")
    pictures, fps = stacked({name: Path(file) for name, _, file in pairs}, options.height)
    drawn = [picture.quantize(COLOURS) for picture in pictures]
    # twice as slow, and the last frame for a second: clips of glyphs are short
    durations = [2000 / fps] * (len(drawn) - 1) + [1000]
    drawn[0].save(options.out, save_all=True, append_images=drawn[1:], duration=durations, loop=0)
    print(f"{options.out}: {drawn[0].width} x {drawn[0].height}, {len(drawn)} frames, {options.out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
