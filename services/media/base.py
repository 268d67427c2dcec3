"""One picture or clip in memory: what clients send, decoders make and scorers look at."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]  # RGB [H, W, 3]


@dataclass(frozen=True)
class Media:
    """One image or video: frames uint8 RGB [T, H, W, 3].

    An image has T = 1 and no ``fps``; a video has ``fps`` > 0. ``selected`` says that the frames are already those of
    the reward's frame spec, so that nobody picks among them again. Raises ``ValueError`` for anything else.
    """

    frames: NDArray[np.uint8]
    fps: float | None = None
    selected: bool = False

    def __post_init__(self) -> None:
        shape = self.frames.shape
        if self.frames.dtype != np.uint8 or len(shape) != 4 or shape[-1] != 3:
            raise ValueError(f"frames must be uint8 [T, H, W, 3], got {self.frames.dtype} {list(shape)}")
        if self.fps is None and shape[0] != 1:
            raise ValueError(f"{shape[0]} frames need fps; an image has one frame")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps must be a positive number, got {self.fps}")

    @classmethod
    def image(cls, pixels: Image) -> Media:
        """An image from uint8 RGB [H, W, 3]."""
        return cls(pixels[None])

    @property
    def is_video(self) -> bool:
        """Whether this is a clip; a clip may have one frame."""
        return self.fps is not None

    @property
    def pixels(self) -> Image:
        """The first frame [H, W, 3]."""
        first: Image = self.frames[0]
        return first
