"""The report in headless Chromium: what a person sees of its clips."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from actors.clips import write_clip
from tests.unit.trainer.report.test_report import make_run
from trainer.report.page import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
RED = np.array([220, 20, 20], np.uint8)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: the report is not looked at here")
def test_nothing_lies_over_a_clip(tmp_path: Path) -> None:
    """A sheet of clips is red to its lowest row, where captions stand, and so is the strip below it; both as wide as their card."""
    height, width = 80, 640
    folder = make_run(tmp_path / "run")
    sheet = np.broadcast_to(RED, (height, width, 3))
    for name in ("before", "after"):
        Image.fromarray(sheet).save(folder / "samples" / f"{name}.png")
        write_clip(folder / "samples" / f"{name}.mp4", np.broadcast_to(sheet, (4, *sheet.shape)), 8.0)
    page, seen = write_report([folder], tmp_path / "report.html"), tmp_path / "seen.png"
    assert BROWSER is not None
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1100,6000", f"--user-data-dir={tmp_path / 'profile'}"]
    subprocess.run([BROWSER, *options, f"--screenshot={seen}", page.as_uri()], check=True, capture_output=True, timeout=120)
    with Image.open(seen) as file:
        pixels = np.asarray(file.convert("RGB")).astype(int)
    red = (np.abs(pixels - RED) < 40).all(-1)
    left = red[:, : red.shape[1] // 2]
    columns = np.flatnonzero(left.sum(0) > height // 2)
    shown = columns[-1] - columns[0] + 1
    assert shown > 300
    assert left[:, columns[0] + shown // 2].sum() == pytest.approx(2 * shown * height / width, rel=0.05)
