"""Clips of any rate and size to the frames that are sampled, and files that hold none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import actors.preparing.clips as module
from actors.preparing.clips import decode_clip
from actors.preparing.cropping import BrokenMediaError
from tests.mixed_clips import BROKEN, FPS, FRAMES, KINDS, encoded, levels, write_folder
from tests.mixed_pictures import encoded as picture


def taken(clip: np.ndarray) -> list[int]:
    """Which frames of `levels(0, …)` a decoded clip is of."""
    return [round((float(frame.mean()) - 20) / 6) for frame in clip]


@pytest.mark.parametrize(
    ("rate", "frames"),
    [
        (16, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (32, [0, 2, 4, 6, 8, 10, 12, 14, 16]),
        (24, [0, 1, 3, 4, 6, 7, 9, 10, 12]),  # 1.5 frames each: of two that are as near, the earlier
        (8, [0, 0, 1, 1, 2, 2, 3, 3, 4]),
        (30, [0, 2, 4, 6, 7, 9, 11, 13, 15]),
    ],
)
def test_frames_are_those_nearest_to_the_wanted_times(rate: int, frames: list[int]) -> None:
    clip, size = decode_clip(encoded(levels(0, 20), rate), 16, 24, FRAMES, FPS)
    assert (clip.shape, clip.dtype, size) == ((FRAMES, 16, 24, 3), np.uint8, (48, 32))
    assert taken(clip) == frames


@pytest.mark.parametrize(("suffix", "codec"), KINDS)
def test_containers_and_codecs(suffix: str, codec: str) -> None:
    assert taken(decode_clip(encoded(levels(0, 12), 16, suffix, codec), 16, 24, FRAMES, FPS)[0]) == list(range(FRAMES))


def test_a_clip_ends_when_its_last_frame_does() -> None:
    assert taken(decode_clip(encoded(levels(0, FRAMES)), 16, 24, FRAMES, FPS)[0])[-1] == FRAMES - 1
    assert taken(decode_clip(encoded(levels(0, 5), 8), 16, 24, FRAMES, FPS)[0]) == [0, 0, 1, 1, 2, 2, 3, 3, 4]
    with pytest.raises(BrokenMediaError, match=r"it ends after 0\.50 s \(4 frames\); 9 frames at 16 a second need more"):
        decode_clip(encoded(levels(0, 4), 8), 16, 24, FRAMES, FPS)


def test_frames_are_turned_upright_and_cropped_as_pictures() -> None:
    clip = np.zeros((FRAMES, 32, 64, 3), np.uint8)
    clip[:, :, :32, 0] = 255  # red on the left
    for turn, red in ((0, np.s_[:, :, :6]), (90, np.s_[:, 6:, :]), (180, np.s_[:, :, 6:]), (-90, np.s_[:, :6, :])):
        found, size = decode_clip(encoded(clip, turn=turn), 12, 12, FRAMES, FPS)
        assert size == ((64, 32) if turn % 180 == 0 else (32, 64))
        rest = found.copy()
        rest[red] = 0
        assert found[red][..., 0].mean() > 200, turn
        assert rest[..., 0].mean() < 40, turn


def test_one_frame_may_be_of_a_picture() -> None:
    assert decode_clip(picture(3), 16, 24, 1, FPS)[0].shape == (1, 16, 24, 3)
    assert taken(decode_clip(encoded(levels(0, 3)), 16, 24, 1, FPS)[0]) == [0]


def test_what_cannot_be_used_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "clips", 10)
    names = [json.loads(line)["file_name"] for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert set(BROKEN) < set(names)
    for name in set(BROKEN) - {"missing.mp4", "no-caption.mp4"}:
        with pytest.raises(BrokenMediaError) as error:
            decode_clip((folder / name).read_bytes(), 16, 24, FRAMES, FPS)
        assert BROKEN[name] in str(error.value), (name, error.value)
    monkeypatch.setattr(module, "MAX_PIXELS", 32 * 48 - 1)
    with pytest.raises(BrokenMediaError, match=r"frames of 48x32 pixels, more than .* \(a decompression bomb\?\)"):
        decode_clip((folder / "short.mp4").read_bytes(), 16, 24, FRAMES, FPS)
