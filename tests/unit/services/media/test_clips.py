"""mp4 files: which frames arrive, every limit, and a decoder that hangs, dies, lies or is told to stop."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from services.contract import FrameSpec, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media import clips
from services.media.base import Media
from services.media.clips import Clip, ClipDecoder, look
from services.media.decode import MediaDecoder
from services.media.plan import Upload

ALL = FrameSpec()
STRIDE = FrameSpec(kind="stride", stride=4)
UNIFORM = FrameSpec(kind="uniform", fps=2.0, min_frames=4, max_frames=768, frames_multiple_of=2)
Mp4 = Callable[..., bytes]


def grey(frames: int, height: int = 64, width: int = 96) -> NDArray[np.uint8]:
    """Frame i has grey level 12 i."""
    return np.broadcast_to((np.arange(frames, dtype=np.uint8) * 12)[:, None, None, None], (frames, height, width, 3)).copy()


def levels(clip: Media | Clip) -> list[int]:
    """Which frames of ``grey`` these are."""
    return [round(float(frame.mean()) / 12) for frame in clip.frames]


def decode(data: bytes, *specs: FrameSpec, **limits: Any) -> Any:
    (clip,) = MediaDecoder(LimitsConfig(**limits)).run([Upload(data)], specs or [ALL])
    return clip


@pytest.mark.parametrize(("codec", "container"), [("libx264", "mp4"), ("libx265", "mp4"), ("mpeg4", "mp4"), ("libx264", "mov"), ("libsvtav1", "mp4")])
def test_frames_of_every_codec(mp4: Mp4, codec: str, container: str) -> None:
    clip = decode(mp4(grey(20), fps=16, codec=codec, container=container))
    assert (clip.fps, clip.total, clip.frames.shape) == (16.0, 20, (20, 64, 96, 3))
    assert levels(clip) == list(range(20))


def test_only_what_the_rewards_look_at_is_decoded(mp4: Mp4) -> None:
    clip = decode(mp4(grey(20), fps=16), STRIDE, UNIFORM)
    assert clip.indices == (0, 4, 6, 8, 12, 13, 16, 19)
    assert levels(clip) == list(clip.indices)
    seen = look(clip, STRIDE), look(clip, UNIFORM)
    assert [levels(m) for m in seen if isinstance(m, Media)] == [[0, 4, 8, 12, 16], [0, 6, 13, 19]]
    assert all(isinstance(m, Media) and m.selected and m.fps == 16 for m in seen)


def test_a_clip_too_short_for_one_reward_serves_the_other(mp4: Mp4) -> None:
    clip = decode(mp4(grey(1), fps=16), STRIDE, UNIFORM)
    short = look(clip, UNIFORM)
    assert isinstance(short, ScoreFailure)
    assert short.code == "too_few_frames"
    assert isinstance(look(clip, STRIDE), Media)


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ({"max_pixels": 6000}, "64x96"),
        ({"max_frames": 10}, "20 frames"),
        ({"max_total_pixels": 19 * 64 * 96}, "exceed the pixels"),
        ({"max_video_frames": 19}, "more than 19"),
    ],
)
def test_limits_refuse_the_request(mp4: Mp4, limits: dict[str, int], says: str) -> None:
    with pytest.raises(ProblemError, match=says) as refused:
        decode(mp4(grey(20)), **limits)
    assert (refused.value.status, refused.value.code) == (413, "video_too_large")


def test_the_pixel_budget_is_one_for_all_clips(mp4: Mp4) -> None:
    data = mp4(grey(20))
    with pytest.raises(ProblemError, match="exceed"):
        MediaDecoder(LimitsConfig(max_total_pixels=30 * 64 * 96)).run([Upload(data), Upload(data)], [ALL])
    assert len(MediaDecoder(LimitsConfig(max_total_pixels=40 * 64 * 96)).run([Upload(data), Upload(data)], [ALL])) == 2


def test_broken_files_fail_alone(mp4: Mp4) -> None:
    good = mp4(grey(12))
    bad = [good[:40], good[: len(good) // 2], good[:4] + b"ftyp" + os.urandom(300), good.replace(b"avc1", b"zzzz"), b"\0\0\0\x08ftyp"]
    files = [Upload(data) for data in (good, *bad, good)]
    first, *failed, last = MediaDecoder(LimitsConfig()).run(files, [ALL])
    assert isinstance(first, Clip)
    assert isinstance(last, Clip)
    for failure in failed:
        assert isinstance(failure, ScoreFailure), failure
        assert failure.code == "media_invalid"
        assert "/" not in failure.message


def test_sound_alone_is_no_video() -> None:
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream: Any = out.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    assert decode(buffer.getvalue()) == ScoreFailure("media_invalid", "the file holds no video")


class TestDecoderProcess:
    def test_one_that_hangs_is_ended_and_replaced(self, mp4: Mp4) -> None:
        decoder = ClipDecoder(LimitsConfig(video_timeout_s=1.5))
        data = mp4(grey(4))
        assert isinstance(decoder.decode(data, [ALL], 10**8), Clip)
        process = decoder._process
        assert process is not None
        os.kill(process.pid, signal.SIGSTOP)
        late = decoder.decode(data, [ALL], 10**8)
        assert isinstance(late, ScoreFailure)
        assert "longer than 1.5 s" in late.message
        assert isinstance(decoder.decode(data, [ALL], 10**8), Clip)
        decoder.close()
        assert process.poll() is not None

    def test_one_that_dies_costs_its_file_only(self, mp4: Mp4) -> None:
        decoder = ClipDecoder(LimitsConfig())
        data = mp4(grey(4))
        assert isinstance(decoder.decode(data, [ALL], 10**8), Clip)
        assert decoder._process is not None
        decoder._process.kill()
        assert isinstance(decoder.decode(data, [ALL], 10**8), ScoreFailure)
        assert isinstance(decoder.decode(data, [ALL], 10**8), Clip)
        decoder.close()

    @pytest.mark.parametrize(
        "reply",
        [
            b"\xff\xff\xff\xff",
            b"\x02\x00\x00\x00{}",
            b"\x04\x00\x00\x00nope",
            b'{"fps":16,"total":9,"indices":[0],"height":100000,"width":100000}',
            b'{"fps":16,"total":9,"indices":[3,1],"height":2,"width":2}',
            b'{"fps":16,"total":9,"indices":[0,1],"height":2,"width":2}',
            b'{"fps":16,"total":9,"indices":[0],"height":2,"width":2,"path":"/"}',
        ],
    )
    def test_one_that_lies_is_not_believed(self, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
        """A decoder under somebody's control announces impossible sizes or sends too little; no memory is taken for it."""
        text = len(reply).to_bytes(4, "little") + reply if reply.startswith(b"{") else reply
        code = f"import sys; sys.stdin.buffer.read(4); sys.stdout.buffer.write({text!r}); sys.stdout.flush()"

        def impostor(_: int) -> subprocess.Popen[bytes]:
            return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)

        monkeypatch.setattr(clips, "_start", impostor)
        decoder = ClipDecoder(LimitsConfig())
        failed = decoder.decode(b"x", [ALL], 10**6)
        assert isinstance(failed, ScoreFailure)
        assert "brought its decoder down" in failed.message
        decoder.close()

    def test_its_limits_hold(self, tmp_path: Path) -> None:
        """In a process confined the same way: no file can be written, few can be opened, memory ends."""
        code = """
import pathlib, resource, sys
from services.media.clip_process import _allow_cpu, _confine
import numpy as np
_confine(200 << 20)
_allow_cpu(5)
found = []
for name, attempt in {
    "write": lambda: pathlib.Path(sys.argv[1]).write_text("x" * 10),
    "open": lambda: [open("/dev/null") for _ in range(20)],
    "memory": lambda: np.ones(400 << 20, np.uint8),
}.items():
    try:
        attempt()
        found.append(name)
    except (OSError, MemoryError):
        pass
print(found, resource.getrlimit(resource.RLIMIT_CPU)[0] < 30, resource.getrlimit(resource.RLIMIT_CORE))
"""
        done = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "probe")], capture_output=True, text=True, timeout=60, cwd=Path(__file__).resolve().parents[4]
        )
        assert done.stdout.strip() == "[] True (0, 0)", done.stdout + done.stderr

    def test_cancelling_ends_it_at_once(self, mp4: Mp4) -> None:
        data = mp4(grey(4))
        decoder = MediaDecoder(LimitsConfig())
        out: list[Any] = []
        worker = threading.Thread(target=lambda: out.extend(decoder.run([Upload(data)] * 200, [ALL])))
        worker.start()
        time.sleep(0.3)
        decoder.cancel()
        worker.join(60)
        assert not worker.is_alive()
        assert len(out) == 200
        assert isinstance(out[-1], ScoreFailure)

    def test_it_sees_nothing_of_our_environment(self, mp4: Mp4, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SECRET_OF_THE_SERVICE", "x")
        decoder = ClipDecoder(LimitsConfig())
        assert isinstance(decoder.decode(mp4(grey(4)), [ALL], 10**8), Clip)
        assert decoder._process is not None
        environment = Path(f"/proc/{decoder._process.pid}/environ").read_bytes()
        decoder.close()
        assert b"PYTHONPATH" in environment
        assert b"SECRET" not in environment
