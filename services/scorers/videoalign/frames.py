"""VideoAlign's rules for frames and their size. Integers only; ``services.media.frames`` picks the frames.

Frames: 2 per second of clip, at least 4, at most 768, an even number, evenly spaced. Size: both sides multiples of 28,
area between 100,352 and 200,704 pixels. Small clips are enlarged. From VideoAlign's ``vision_process.py``.

Worked example: a 1280x720 clip exceeds the area, so it shrinks by sqrt(720 * 1280 / 200704) = 2.142857 to 336x597,
and 597 goes down to 588. Sizes here are (height, width): (720, 1280) → (336, 588).
"""

from __future__ import annotations

import math

from services.contract import FrameSpec

PATCH = 14
MERGE = 2
FACTOR = PATCH * MERGE
TEMPORAL_PATCH = 2
MIN_FRAMES = 4
MAX_FRAMES = 768
MIN_PIXELS = 128 * FACTOR * FACTOR
MAX_ASPECT = 200


class UnusableSize(ValueError):
    """The frames cannot be brought to an accepted size; the text may go to the client."""


def frame_spec(fps: float | None, num_frames: int | None, max_frame_pixels: int) -> FrameSpec:
    """The frame spec of a checkpoint's data settings; ``num_frames`` replaces the rate where it is set."""
    even = None if num_frames is None else max(round(num_frames / TEMPORAL_PATCH) * TEMPORAL_PATCH, TEMPORAL_PATCH)
    return FrameSpec(
        kind="uniform",
        fps=fps if even is None else None,
        min_frames=MIN_FRAMES if even is None else TEMPORAL_PATCH,
        max_frames=MAX_FRAMES if even is None else even,
        frames_multiple_of=TEMPORAL_PATCH,
        max_frame_pixels=max_frame_pixels,
        multiple_of=FACTOR,
        interpolation="bicubic, antialiased, rounded to uint8",
    )


def resized(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """Height and width after the resize. Raises ``UnusableSize`` beyond an aspect ratio of 200."""
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise UnusableSize(f"frames of {height}x{width} pixels exceed the aspect ratio of {MAX_ASPECT}")
    # Python's round, a tie to the even number, and float64 as in the reference: 720 / 2.142857… must stay 336.
    tall, wide = (max(FACTOR, round(side / FACTOR) * FACTOR) for side in (height, width))
    if tall * wide > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        tall, wide = (math.floor(side / shrink / FACTOR) * FACTOR for side in (height, width))
        if min(tall, wide) < FACTOR:
            raise UnusableSize(f"frames of {height}x{width} pixels would shrink below {FACTOR} pixels on one side")
    elif tall * wide < MIN_PIXELS:
        grow = math.sqrt(MIN_PIXELS / (height * width))
        tall, wide = (math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width))
    return tall, wide


def grid(frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Patches along time, height and width of a resized clip with an even number of frames."""
    return frames // TEMPORAL_PATCH, height // PATCH, width // PATCH


def video_tokens(patches: tuple[int, int, int]) -> int:
    """Tokens the language model sees for a grid of patches: 2x2 patches make one."""
    return math.prod(patches) // (MERGE * MERGE)
