"""Real parts for the reward tests: a uvicorn server in a thread, pictures of text from bundled fonts."""

from __future__ import annotations

import io
import os
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import av
import matplotlib
import numpy as np
import pytest
import uvicorn
from anyio import to_thread
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from services.contract import ItemScore, ModelHealth, ModelInfo, ScoreFailure
from services.media.base import Media
from services.scorers.base import Scorer
from services.scorers.ocr import OcrScorer
from services.scorers.scene import SceneScorer
from services.scorers.settings import OcrReward, SceneReward

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


class InProcess:
    """A ``ScoreBackend`` with real scorers in this process and no Serve; ``faults`` makes a model misbehave by name."""

    def __init__(self, scorers: dict[str, Scorer]) -> None:
        self.scorers = scorers
        self.faults: dict[str, Callable[[], Awaitable[None]]] = {}
        self.seen: list[tuple[str, list[Media]]] = []

    async def models(self) -> list[ModelInfo]:
        return [scorer.info(name) for name, scorer in self.scorers.items()]

    async def score(self, model: str, prompts: list[str], media: list[Media], deadline_s: float) -> list[ItemScore | ScoreFailure]:
        self.seen.append((model, media))
        if model in self.faults:
            await self.faults[model]()
        return await to_thread.run_sync(self.scorers[model].score, prompts, media)

    async def health(self) -> list[ModelHealth]:
        return [ModelHealth(name=name, status="starting" if name in self.faults else "ready", replicas=1) for name in self.scorers]


@pytest.fixture(scope="module")
def backend() -> InProcess:
    """OCR (images of one line) and plain statistics (images and clips)."""
    return InProcess({"ocr": OcrScorer(OcrReward(mode="flow_grpo", reading="recognition")), "scene": SceneScorer(SceneReward())})


def encode_mp4(frames: NDArray[np.uint8], fps: int = 16, codec: str = "libx264", container: str = "mp4") -> bytes:
    """A clip of uint8 RGB [T, H, W, 3] frames."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as out:
        stream: Any = out.add_stream(codec, rate=fps)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        out.mux(stream.encode(None))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def mp4() -> Callable[..., bytes]:
    """See ``encode_mp4``."""
    return encode_mp4
