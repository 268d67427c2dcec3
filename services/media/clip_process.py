"""The process that decodes mp4 files: ``python -m services.media.clip_process``, started by ``services.media.clips``.

It holds ffmpeg (through PyAV), and whatever a hostile file does to ffmpeg stays here: address space, CPU time and open
files are limited, no file can be written, standard error leads nowhere. Orders come on standard input until it closes.

Two passes over a file: packets are counted without decoding, which gives the number of frames and so the indices a
reward wants; then frames are decoded and only the wanted ones are kept. Containers: mp4 and mov. Frame rate is the
stream's average; rotation and edit-list timing are not applied. Colours are converted by ffmpeg's swscale.
"""

from __future__ import annotations

import io
import os
import resource
import sys
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from numpy.typing import NDArray

from services.media.clip_protocol import ClipOrder, ClipReply, read_message, write_message
from services.media.frames import TooFewFrames, frame_indices

CODECS = ("h264", "hevc", "av1", "libdav1d", "vp9", "libvpx-vp9", "mpeg4", "mjpeg")


class _Trouble(Exception):
    """Ends one file; ``kind`` is a ``ClipReply.trouble``."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def decode(data: bytes, order: ClipOrder) -> tuple[ClipReply, list[NDArray[np.uint8]]]:
    """The wanted frames of one file, uint8 RGB [H, W, 3] each."""
    total, fps, height, width = _survey(data, order)
    while True:
        wanted = _wanted(order, total, fps, height * width)
        frames, seen = _frames(data, wanted, height, width, order)
        if len(frames) == len(wanted):
            return ClipReply(fps=fps, total=total, indices=wanted, height=height, width=width), frames
        if not 0 < seen < total:
            raise _Trouble("invalid", "the video is damaged: frames are missing")
        total = seen  # packets that hold no picture: choose again among the frames there are


def _open(data: bytes) -> Any:
    return av.open(io.BytesIO(data), mode="r", format="mp4")


def _stream(container: Any, order: ClipOrder) -> Any:
    if not container.streams.video:
        raise _Trouble("invalid", "the file holds no video")
    stream = container.streams.video[0]
    if stream.codec_context.name not in CODECS:
        raise _Trouble("invalid", "the video's codec is not accepted; use h264, hevc, av1, vp9 or mpeg4")
    stream.codec_context.thread_count = 1
    if stream.codec_context.height * stream.codec_context.width > order.max_pixels:
        raise _Trouble("too_large", f"a clip has frames of {stream.codec_context.height}x{stream.codec_context.width}, at most {order.max_pixels} pixels each")
    return stream


def _survey(data: bytes, order: ClipOrder) -> tuple[int, float, int, int]:
    """Number of frames, frames per second, height, width; nothing is decoded."""
    with _open(data) as container:
        stream = _stream(container, order)
        fps = float(stream.average_rate or stream.guessed_rate or 0)
        if not 0 < fps <= 1000:
            raise _Trouble("invalid", "the video has no usable frame rate")
        total = 0
        for packet in container.demux(stream):
            total += bool(packet.size) and not packet.is_discard
            if total > order.max_video_frames:
                raise _Trouble("too_large", f"a clip has more than {order.max_video_frames} frames")
        height, width = stream.codec_context.height, stream.codec_context.width
    if total == 0 or height < 1 or width < 1:
        raise _Trouble("invalid", "the video has no frames")
    return total, fps, height, width


def _wanted(order: ClipOrder, total: int, fps: float, pixels: int) -> list[int]:
    """Indices that any of the specs looks at; a spec that finds the clip too short wants what there is."""
    wanted: set[int] = set()
    for spec in order.specs:
        try:
            wanted |= set(frame_indices(spec, total, fps))
        except TooFewFrames:
            wanted |= set(range(total))
    if len(wanted) > order.max_frames:
        raise _Trouble("too_large", f"a reward looks at {len(wanted)} frames of a clip, at most {order.max_frames}")
    if len(wanted) * pixels > order.max_total_pixels:
        raise _Trouble("too_large", f"{len(wanted)} frames of {pixels} pixels exceed the pixels of a request")
    return sorted(wanted)


def _frames(data: bytes, wanted: list[int], height: int, width: int, order: ClipOrder) -> tuple[list[NDArray[np.uint8]], int]:
    """The frames at ``wanted`` as far as they exist, and how many frames were seen."""
    chosen, kept, seen = set(wanted), [], 0
    with _open(data) as container:
        for frame in container.decode(_stream(container, order)):
            if (frame.height, frame.width) != (height, width):
                raise _Trouble("invalid", "the video changes its size")
            if seen in chosen:
                kept.append(frame.to_ndarray(format="rgb24"))
            seen += 1
            if len(kept) == len(wanted) or seen > order.max_video_frames:
                break
    return kept, seen


def _confine(memory_bytes: int) -> None:
    """Limits for the rest of this process's life, on top of what it uses now."""
    statm = Path("/proc/self/statm")
    used = int(statm.read_text().split()[0]) * resource.getpagesize() if statm.exists() else 1 << 30
    for what, limit in (
        (resource.RLIMIT_AS, used + memory_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 8),
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(what, (limit, limit))


def _allow_cpu(seconds: float) -> None:
    """CPU time for the next file; the kernel ends the process beyond it."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(usage.ru_utime + usage.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def _answer(orders: BinaryIO, replies: BinaryIO) -> bool:
    """Serve one order; False when there are no more."""
    try:
        order = ClipOrder.model_validate_json(read_message(orders))
    except EOFError:
        return False
    data = orders.read(order.size)
    _allow_cpu(order.cpu_s)
    frames: list[NDArray[np.uint8]] = []
    try:
        reply, frames = decode(data, order)
    except _Trouble as trouble:
        reply = ClipReply.model_validate({"trouble": trouble.kind, "message": str(trouble)})
    except MemoryError:
        reply = ClipReply(trouble="invalid", message="decoding the video needs more memory than is allowed")
    except Exception as error:  # ffmpeg raises many kinds on damaged bytes
        reply = ClipReply(trouble="invalid", message=f"the video is damaged ({type(error).__name__})")
    write_message(replies, reply)
    for frame in frames:
        replies.write(np.ascontiguousarray(frame).data)
    replies.flush()
    return True


def main() -> None:
    """Serve orders until standard input closes."""
    av.logging.set_level(av.logging.PANIC)
    # Nothing but replies may reach the reply pipe, whatever a library prints.
    replies = os.fdopen(os.dup(1), "wb", buffering=1 << 20)
    os.dup2(2, 1)
    _confine(int(sys.argv[1]))
    while _answer(sys.stdin.buffer, replies):
        pass


if __name__ == "__main__":
    main()
