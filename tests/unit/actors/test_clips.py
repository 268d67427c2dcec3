"""Clips as people see them."""

from __future__ import annotations

import io
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from actors.clips import GIF_FRAMES, GIF_WIDTH, SHOWN, animated, playing_sheet, shown, strip, strip_sheet, write_clip


def moving(frames: int = 9, height: int = 17, width: int = 33) -> np.ndarray:
    """A bright block that moves to the right on a dark ground."""
    clip = np.full((frames, height, width, 3), 30, np.uint8)
    for i, frame in enumerate(clip):
        frame[4:12, 3 * i : 3 * i + 8] = 220
    return clip


@pytest.mark.parametrize("fps", [16.0, 23.976])
def test_a_clip_is_written_for_browsers_and_read_again(fps: float, tmp_path: Path) -> None:
    clip = moving()
    write_clip(tmp_path / "a.mp4", clip, fps)
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]
    with av.open(str(tmp_path / "a.mp4")) as file:
        stream = file.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt, stream.width, stream.height) == ("h264", "yuv420p", 34, 18)
        assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
        found = np.stack([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])
    assert found.shape == (9, 18, 34, 3)
    assert np.abs(found[:, :17, :33].astype(int) - clip).mean() < 8  # 4:2:0 blurs colour
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # a player may begin before it has all


def test_a_strip_holds_the_first_and_the_last_frame() -> None:
    clip = moving()
    found = strip(clip)
    assert found.shape == (17, 4 * 33, 3)
    np.testing.assert_array_equal(found[:, :33], clip[0])
    np.testing.assert_array_equal(found[:, -33:], clip[-1])
    assert strip(clip[:2]).shape == (17, 66, 3)


def test_strips_of_small_clips_are_enlarged_until_their_captions_can_be_read() -> None:
    clips = np.stack([moving(5, 12, 32)] * 3)
    sheet = np.asarray(strip_sheet(clips, ['the number "407" moving left'] * 3))
    scale = 4
    assert sheet.shape[1] == 2 * (4 * 32 * scale + 8)
    np.testing.assert_array_equal(sheet[2 : 2 + 12 * scale : scale, 4 : 4 + 4 * 32 * scale : scale], strip(clips[0]))


def test_a_sheet_of_clips_plays_them_in_step() -> None:
    clips = np.stack([moving(), moving()[::-1]])
    sheet = playing_sheet(clips, ["right", "left"], columns=2)
    assert len(sheet) == 9
    np.testing.assert_array_equal(sheet[0][:, : sheet.shape[2] // 2][2:53], sheet[8][:, sheet.shape[2] // 2 :][2:53])


def test_an_animation_of_a_large_clip_is_bounded(tmp_path: Path) -> None:
    clip = np.zeros((2 * GIF_FRAMES + 1, 18, 2 * GIF_WIDTH, 3), np.uint8)
    clip[:, :, :, 0] = np.linspace(0, 255, len(clip)).astype(np.uint8)[:, None, None]
    write_clip(tmp_path / "a.mp4", clip, 24.0)
    data, size = animated(tmp_path / "a.mp4")
    with Image.open(io.BytesIO(data)) as gif:
        assert gif.size == size == (GIF_WIDTH, 9)
        assert gif.n_frames == -(-len(clip) // 3)  # type: ignore[attr-defined]
        assert gif.info["duration"] == 120  # three frames of 1/24 s, in hundredths


def test_large_clips_are_shown_smaller_and_small_ones_as_they_are() -> None:
    clip = np.repeat(np.arange(640, dtype=np.float64) * 255 / 639, 3).reshape(1, 1, 640, 3).round().astype(np.uint8).repeat(352, 1).repeat(2, 0)
    small = shown(clip)
    assert (small.shape, small.dtype) == ((2, 176, SHOWN, 3), np.uint8)
    np.testing.assert_allclose(small[1, 80, 10:-10, 0], clip[1, 80, 20:-20:2, 0], atol=2)
    assert shown(small) is small
