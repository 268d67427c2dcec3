"""Sheets of clips below each other, in step."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.clips import write_clip
from benchmarks import clips


def sheet(path: Path, frames: int, shade: int) -> Path:
    """A clip that is darker at the bottom and brighter in every frame."""
    clip = np.full((frames, 32, 64, 3), shade, np.uint8)
    clip[:, 20:] = 0
    write_clip(path, clip + (np.arange(frames, dtype=np.uint8) * 10)[:, None, None, None], 8.0)
    return path


def test_the_top_of_every_sheet_plays_in_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = sheet(tmp_path / "a.mp4", 3, 60), sheet(tmp_path / "b.mp4", 3, 180)
    out = tmp_path / "out.gif"
    monkeypatch.setattr(sys, "argv", ["clips", str(out), f"before={one}", f"after={two}", "--height", "20"])
    clips.main()
    assert "64 x 72, 3 frames" in capsys.readouterr().out
    with Image.open(out) as gif:
        assert gif.n_frames == 3
        for i in range(3):
            gif.seek(i)
            pixels = np.asarray(gif.convert("L")).astype(int)
            for top, shade in ((0, 60), (36, 180)):
                part = pixels[top + clips.LABEL + 2 : top + clips.LABEL + 18]
                assert abs(part.mean() - shade - 10 * i) < 6
            assert gif.info["duration"] == (1000 if i == 2 else 250)


def test_sheets_that_cannot_play_in_step_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": sheet(tmp_path / "a.mp4", 3, 60), "b": sheet(tmp_path / "b.mp4", 4, 60)}
    with pytest.raises(SystemExit, match="sheets differ in frames"):
        clips.stacked(files, 20)
    monkeypatch.setattr(sys, "argv", ["clips", "out.gif", "a.mp4"])
    with pytest.raises(SystemExit, match=r"'a\.mp4' is not NAME=FILE"):
        clips.main()
