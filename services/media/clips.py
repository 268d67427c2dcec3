"""mp4 files → frames, in a process of their own with limits and a deadline; see ``clip_process``.

Invariant: whatever a file does to its decoder, this process only ever reads a bounded message and the number of bytes
that it announced and that the limits allow. A decoder that dies or runs late costs its file a typed failure and is
replaced for the next one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from services.contract import FrameSpec, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Media
from services.media.clip_protocol import ClipOrder, ClipReply, read_message, write_message
from services.media.frames import TooFewFrames, frame_indices, take
from services.media.plan import invalid


def is_clip(data: bytes) -> bool:
    """An mp4 or mov file by its first box."""
    return data[4:8] in (b"ftyp", b"moov", b"wide")


@dataclass(frozen=True)
class Clip:
    """The frames [N, H, W, 3] at ``indices`` of a clip of ``total`` frames."""

    frames: NDArray[np.uint8]
    fps: float
    total: int
    indices: tuple[int, ...]

    def look(self, spec: FrameSpec) -> Media:
        """What ``spec`` looks at; its indices are among those that were asked for. Raises ``TooFewFrames``."""
        wanted = frame_indices(spec, self.total, self.fps)
        if tuple(wanted) == self.indices:
            return Media(self.frames, self.fps, selected=True)
        place = {index: i for i, index in enumerate(self.indices)}
        return Media(self.frames[[place[i] for i in wanted]], self.fps, selected=True)


class ClipDecoder:
    """Decodes the files of one request, one after the other. ``kill`` may be called from any thread."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def decode(self, data: bytes, specs: Sequence[FrameSpec], max_total_pixels: int) -> Clip | ScoreFailure:
        """Frames of ``data`` that ``specs`` look at. Raises ``ProblemError`` 413 when a limit is exceeded."""
        limits = self._limits
        order = ClipOrder(
            size=len(data),
            specs=list(specs),
            max_pixels=limits.max_pixels,
            max_frames=limits.max_frames,
            max_total_pixels=max_total_pixels,
            max_video_frames=limits.max_video_frames,
            cpu_s=limits.video_timeout_s,
        )
        process = self._running()
        if process is None:
            return invalid("the request was given up")
        late = threading.Event()

        def give_up() -> None:
            late.set()
            process.kill()

        watchdog = threading.Timer(limits.video_timeout_s, give_up)
        watchdog.daemon = True
        watchdog.start()
        try:
            return self._exchange(process, order, data)
        except (OSError, EOFError, ValidationError):
            self._discard()
            return invalid(f"the video took longer than {limits.video_timeout_s:g} s to decode" if late.is_set() else "the video brought its decoder down")
        finally:
            watchdog.cancel()

    def kill(self) -> None:
        """End the decoder for good; a ``decode`` in progress fails."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the decoder and wait for it."""
        self.kill()
        self._discard()

    def _exchange(self, process: subprocess.Popen[bytes], order: ClipOrder, data: bytes) -> Clip | ScoreFailure:
        orders, replies = cast(BinaryIO, process.stdin), cast(BinaryIO, process.stdout)
        write_message(orders, order)
        orders.write(data)
        orders.flush()
        reply = ClipReply.model_validate_json(read_message(replies))
        if reply.trouble == "too_large":
            raise ProblemError(413, "video_too_large", reply.message)
        if reply.trouble is not None:
            return invalid(reply.message)
        shape = (len(reply.indices), reply.height, reply.width, 3)
        pixels = shape[0] * shape[1] * shape[2]
        if not 0 < pixels <= order.max_total_pixels or reply.fps <= 0 or reply.indices != sorted(set(reply.indices)):
            raise EOFError("a reply outside the order")
        frames = np.empty(shape, np.uint8)
        view, got = memoryview(cast(Any, frames.reshape(-1))), 0
        while got < len(view):
            n = cast(Any, replies).readinto(view[got:])
            if not n:
                raise EOFError("frames are missing")
            got += n
        return Clip(frames, reply.fps, reply.total, tuple(reply.indices))

    def _running(self) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._closed:
                return None
            if self._process is None:
                self._process = _start(self._limits.video_memory_bytes)
            return self._process

    def _discard(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):  # bytes that nobody will read any more
                        pipe.close()
            process.wait(timeout=10)


def _start(memory_bytes: int) -> subprocess.Popen[bytes]:
    """A fresh decoder. It sees where Python's modules are and nothing else of this process's environment."""
    packages = [str(Path(__file__).resolve().parents[2]), *filter(None, sys.path)]
    environment = {"PYTHONPATH": os.pathsep.join(packages), "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PATH": os.defpath}
    return subprocess.Popen(
        [sys.executable, "-m", "services.media.clip_process", str(memory_bytes)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd="/",
        env=environment,
        close_fds=True,
        start_new_session=True,
    )


def look(media: Media | Clip, spec: FrameSpec) -> Media | ScoreFailure:
    """``media`` as a reward with ``spec`` sees it."""
    try:
        return media.look(spec) if isinstance(media, Clip) else take(spec, media)
    except TooFewFrames as error:
        return ScoreFailure("too_few_frames", str(error))
