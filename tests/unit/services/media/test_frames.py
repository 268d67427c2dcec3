"""Frame specs: VideoAlign's table, agreement with torch's rounding, bounds for every clip."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.contract import FrameSpec
from services.media.base import Media
from services.media.frames import TooFewFrames, frame_indices, take

VIDEOALIGN = FrameSpec(kind="uniform", fps=2.0, min_frames=4, max_frames=768, frames_multiple_of=2)


@pytest.mark.parametrize(
    ("total", "fps", "count"),
    [(93, 16, 12), (93, 24, 8), (81, 16, 10), (53, 16, 6), (126, 24, 10), (152, 30, 10), (60, 16, 8), (9, 16, 4), (3, 16, 2)],
)
def test_videoaligns_table(total: int, fps: float, count: int) -> None:
    indices = frame_indices(VIDEOALIGN, total, fps)
    assert indices == torch.linspace(0, total - 1, count).round().long().tolist()


def test_a_single_frame_is_too_few_for_videoalign() -> None:
    with pytest.raises(TooFewFrames, match="1 frames"):
        frame_indices(VIDEOALIGN, 1, 16)


def test_uniform_rounds_as_torch_does() -> None:
    for total in range(2, 300):
        for count in range(2, min(total, 33) + 1):
            spec = FrameSpec(kind="uniform", max_frames=count)
            assert frame_indices(spec, total, 24) == torch.linspace(0, total - 1, count).round().long().tolist(), (total, count)


specs = st.builds(
    FrameSpec,
    kind=st.sampled_from(["all", "uniform", "stride", "image"]),
    fps=st.none() | st.floats(0.1, 60),
    stride=st.integers(1, 9),
    min_frames=st.none() | st.integers(1, 9),
    max_frames=st.integers(1, 40),
    frames_multiple_of=st.integers(1, 4),
)


@given(specs, st.integers(1, 200), st.floats(0.5, 240))
def test_indices_ascend_within_the_clip(spec: FrameSpec, total: int, fps: float) -> None:
    try:
        indices = frame_indices(spec, total, fps)
    except TooFewFrames:
        assert spec.kind == "uniform"
        assert min(total, spec.max_frames or total) < spec.frames_multiple_of
        return
    assert indices == sorted(set(indices))
    assert indices[0] == 0
    assert indices[-1] < total
    assert len(indices) <= (spec.max_frames or total)
    if spec.kind == "uniform":
        assert len(indices) % spec.frames_multiple_of == 0


def test_take_is_idempotent_and_leaves_images_alone() -> None:
    clip = Media(np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, -1), fps=16.0)
    once = take(FrameSpec(kind="stride", stride=4), clip)
    assert once.frames[:, 0, 0, 0].tolist() == [0, 4, 8, 12, 16]
    assert take(FrameSpec(kind="stride", stride=4), once) is once
    image = Media.image(clip.frames[0])
    assert take(VIDEOALIGN, image) is image


def test_incomplete_specs_are_refused() -> None:
    with pytest.raises(ValueError, match="stride"):
        FrameSpec(kind="stride")
    with pytest.raises(ValueError, match="max_frames"):
        FrameSpec(kind="uniform")
