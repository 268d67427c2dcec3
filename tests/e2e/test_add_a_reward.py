"""docs/add-a-reward.md: its class and its entry, taken off the page and run by its own commands, up to a served score."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as PILImage

from services.client.rest import RestRewardClient
from services.contract import ItemScore
from services.media.base import Media
from tests.pipeline import ROOT, command

PAGE = (ROOT / "docs" / "add-a-reward.md").read_text()
SERVE_DEADLINE_S = 180.0


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def lines_with(words: str) -> list[str]:
    found = [line.removeprefix(".venv/bin/ddrl ").split() for line in block_lines("sh") if words in line]
    assert found, f"the page has no command with {words!r}"
    return found[0]


def block_lines(language: str) -> list[str]:
    return [line for text in re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL) for line in text.splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What somebody who follows the page has in a folder."""
    (tmp_path / "redness.py").write_text(block("python"))
    (tmp_path / "rewards.yaml").write_text(block("yaml"))
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[..., 0], picture[..., 2] = 255, 51
    PILImage.fromarray(picture).save(tmp_path / "picture.png")
    return tmp_path


def environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "RAY_AUTH_MODE": "disabled"}


def run(folder: Path, words: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*words), cwd=folder, env=environment(folder), text=True, capture_output=True, timeout=120, check=False)


def test_the_self_test_and_a_score_from_the_shell(folder: Path) -> None:
    tested = run(folder, lines_with("self-test"))
    assert tested.returncode == 0, tested.stdout + tested.stderr
    assert "redness: ok" in tested.stdout
    assert "redness-1;max" in tested.stdout
    scored = run(folder, [*lines_with("score picture"), "--json"])
    assert scored.returncode == 0, scored.stdout + scored.stderr
    assert '"redness":0.8' in scored.stdout
    assert '"bits_per_pixel"' in scored.stdout


def test_a_misspelt_field_of_one_s_own_is_named(folder: Path) -> None:
    (folder / "rewards.yaml").write_text(block("yaml").replace("channel", "chanel"))
    tested = run(folder, lines_with("self-test"))
    assert tested.returncode == 2
    assert "channel" in tested.stderr
    assert "Traceback" not in tested.stderr


@pytest.fixture
def served(folder: Path) -> Iterator[str]:
    """`ddrl serve` as on the page, on a free port."""
    words = [*lines_with("serve rewards"), "--port", "0"]
    process = subprocess.Popen(command(*words), cwd=folder, env=environment(folder), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    try:
        yield _address(process)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    seen, deadline = "", time.monotonic() + SERVE_DEADLINE_S
    while time.monotonic() < deadline:
        line = process.stdout.readline()
        seen += line
        if found := re.search(r"ready: (http://\S+)", line):
            return found[1]
        assert line or process.poll() is None, f"ddrl serve ended:\n{seen}"
    raise AssertionError(f"ddrl serve was not ready:\n{seen}")


def test_a_served_score_of_an_image_and_a_clip(served: str) -> None:
    client = RestRewardClient(served)
    red = np.zeros((4, 16, 16, 3), np.uint8)
    red[..., 0] = 255
    info = client.check(["redness"])["redness"]
    assert (info.revision, info.media) == ("redness-1;max", ["image", "video"])
    results = client.score("redness", ["", ""], [Media.image(red[0]), Media(red, fps=8)], 60)
    assert results == [ItemScore(1.0, {"redness": 1.0, "red": 1.0})] * 2
    client.close()
