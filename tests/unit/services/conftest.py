"""Real parts for the reward tests: a uvicorn server in a thread, pictures of text from bundled fonts."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import uvicorn
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"


@contextmanager
def _served(app: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 10
    while not server.started:
        assert time.monotonic() < deadline, "the test server did not start"
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.fixture(scope="module")
def serve_app() -> Iterator[Callable[[Any], str]]:
    """Serve an ASGI app on a free loopback port until the module ends; returns its URL."""
    with ExitStack() as stack:
        yield lambda app: stack.enter_context(_served(app))


def draw_glyphs(
    text: str,
    px: int = 12,
    font: str = "DejaVuSans",
    ink: tuple[int, int, int] = (0, 0, 0),
    paper: tuple[int, int, int] = (255, 255, 255),
) -> NDArray[np.uint8]:
    """``text`` centred on a 16x48 RGB image, at whole-pixel positions."""
    picture = Image.new("RGB", (48, 16), paper)
    pen, face = ImageDraw.Draw(picture), ImageFont.truetype(str(FONTS / f"{font}.ttf"), px)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=face)
    pen.text((round((48 - left - right) / 2), round((16 - top - bottom) / 2)), text, font=face, fill=ink)
    return np.asarray(picture, np.uint8)


@pytest.fixture(scope="session")
def draw() -> Callable[..., NDArray[np.uint8]]:
    """See ``draw_glyphs``."""
    return draw_glyphs


def draw_text_line(text: str, px: int = 32, font: str = "DejaVuSans") -> NDArray[np.uint8]:
    """``text`` in black on white with a margin all around, [H, W, 3]."""
    pen, face = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.truetype(str(FONTS / f"{font}.ttf"), px)
    left, top, right, bottom = pen.textbbox((0, 0), text, font=face)
    picture = Image.new("RGB", (round(right - left) + 2 * px, round(bottom - top) + 2 * px), "white")
    ImageDraw.Draw(picture).text((px - round(left), px - round(top)), text, font=face, fill="black")
    return np.asarray(picture, np.uint8)


@pytest.fixture(scope="session")
def draw_line() -> Callable[..., NDArray[np.uint8]]:
    """See ``draw_text_line``."""
    return draw_text_line


@pytest.fixture(scope="session")
def shared_data() -> Callable[[str], Path]:
    """Path of a third-party file kept beside the repository, or at DDRL_SHARED_DATA; skips the test without it."""
    root = Path(os.environ.get("DDRL_SHARED_DATA") or Path(__file__).resolve().parents[4] / "shared" / "data")

    def find(name: str) -> Path:
        path = root / name
        if not path.exists():
            pytest.skip(f"{path} is not there; set DDRL_SHARED_DATA to a folder that has {name}")
        return path

    return find
