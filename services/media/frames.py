"""Which frames a reward looks at: a frame spec and a clip in, indices out. Pure.

Worked example, VideoAlign's rule (uniform, 2 frames per second, 4 to 768, an even number): 93 frames at 16 fps last
5.8 s, so 11.625 frames are wanted, 12 after rounding to even: 0, 8, 17, 25, 33, 42, 50, 59, 67, 75, 84, 92.

Invariant: ``take`` twice gives what ``take`` once gives; its result is marked ``selected``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from services.contract import FrameSpec
from services.media.base import Media


class TooFewFrames(ValueError):
    """The clip is shorter than the reward can judge; the text may go to the client."""


def frame_count(spec: FrameSpec, total: int, fps: float) -> int:
    """How many frames ``spec`` takes from ``total`` frames at ``fps`` per second. Raises ``TooFewFrames``."""
    if spec.kind == "image":
        return min(1, total)
    if spec.kind == "all":
        count = total
    elif spec.kind == "stride":
        count = -(-total // (spec.stride or 1))
    else:
        return _uniform_count(spec, total, fps)
    return min(count, spec.max_frames or count)


def _uniform_count(spec: FrameSpec, total: int, fps: float) -> int:
    step = spec.frames_multiple_of
    most = min(spec.max_frames or total, total) // step * step
    least = -(-(spec.min_frames or 1) // step) * step
    wanted = float(most) if spec.fps is None else total / fps * spec.fps
    # Python's round: a tie goes to the even number, as the reference rules do.
    count = round(min(max(wanted, least), most) / step) * step
    if count < 1:
        raise TooFewFrames(f"the clip has {total} frames, the reward needs at least {step}")
    return int(count)


def frame_indices(spec: FrameSpec, total: int, fps: float) -> list[int]:
    """Ascending indices in [0, total). Raises ``TooFewFrames``."""
    count = frame_count(spec, total, fps)
    if spec.kind == "uniform":
        return _spread(total, count)
    stride = (spec.stride or 1) if spec.kind == "stride" else 1
    return list(range(0, count * stride, stride))


def _spread(total: int, count: int) -> list[int]:
    """``count`` indices from 0 to total - 1, rounded like ``torch.linspace(0, total - 1, count).round()`` in float32."""
    if count == 1:
        return [0]
    last, step, index = np.float32(total - 1), np.float32(total - 1) / np.float32(count - 1), np.arange(count, dtype=np.float32)
    # From both ends towards the middle, as torch does; a tie such as 4.5 depends on it.
    points = np.where(index < count // 2, step * index, last - step * (count - 1 - index))
    return [int(i) for i in np.round(points)]


def take(spec: FrameSpec, media: Media) -> Media:
    """``media`` with only the frames that ``spec`` looks at. Images pass unchanged. Raises ``TooFewFrames``."""
    if media.fps is None or media.selected:
        return media
    indices = frame_indices(spec, len(media.frames), media.fps)
    frames = media.frames if len(indices) == len(media.frames) else media.frames[indices]
    return Media(frames, media.fps, selected=True)


def reduced(media: Sequence[Media], specs: Sequence[FrameSpec]) -> list[Media]:
    """Only the frames that the rewards look at, where they agree on them; too short clips go out whole and fail there."""
    if not specs or any(spec != specs[0] for spec in specs):
        return list(media)
    out: list[Media] = []
    for item in media:
        try:
            out.append(take(specs[0], item))
        except TooFewFrames:
            out.append(item)
    return out
