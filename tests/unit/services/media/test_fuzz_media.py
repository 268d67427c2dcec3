"""Hostile bytes against every parser: the answer is pixels within the limits, a typed failure or a problem; nothing else.

`make test` runs a share; the long tests run thousands.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image as PILImage
from safetensors import SafetensorError, deserialize
from safetensors.numpy import save

from services.contract import FrameSpec, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Media
from services.media.clips import Clip
from services.media.decode import MediaDecoder
from services.media.plan import MEDIA_INVALID, Refused, Upload
from services.media.tensors import parse
from services.rest.requests import parse_call

LIMITS = LimitsConfig(max_pixels=20_000, max_total_pixels=200_000, max_frames=40, max_items=8, max_video_frames=100, video_timeout_s=10)
PICTURE = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encoded(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, PICTURE)
    else:
        PILImage.fromarray(PICTURE).save(buffer, kind, **options)
    return buffer.getvalue()


SEEDS = [encoded("PNG"), encoded("JPEG"), encoded("WEBP"), encoded("WEBP", lossless=True), encoded("npy")]


@st.composite
def damaged(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """A real file with bytes changed, cut out, doubled or appended."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        how = draw(st.sampled_from(["set", "cut", "insert", "double", "end"]))
        if how == "set" and data:
            data[at] = draw(st.integers(0, 255))
        elif how == "cut":
            del data[at : at + draw(st.integers(1, 40))]
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=20))
        elif how == "double":
            data[at:at] = data[at : at + 30]
        else:
            del data[at:]
    return bytes(data)


def hold(uploads: list[Upload]) -> None:
    """Decode, and check that the outcome is one of the allowed ones."""
    found: list[Any] = []
    refused: list[int] = []
    try:
        found = MediaDecoder(LIMITS).run(uploads, [FrameSpec()])
    except ProblemError as problem:
        refused.append(problem.status)
    if refused:
        assert refused == [413]
        return
    assert sum(m.frames.size for m in found if not isinstance(m, ScoreFailure)) <= 3 * LIMITS.max_total_pixels
    for m in found:
        assert isinstance(m, Media | Clip | ScoreFailure)
        if isinstance(m, ScoreFailure):
            assert m.code == MEDIA_INVALID
            assert len(m.message) < 300
            assert "/" not in m.message


@given(damaged(SEEDS) | st.binary(max_size=300), st.none() | st.floats(0.1, 100), st.sampled_from([None, "image", "video"]))
@settings(max_examples=300)
def test_pictures_and_arrays(data: bytes, fps: float | None, kind: str | None) -> None:
    hold([Upload(data, kind, fps), Upload(SEEDS[0])])


@pytest.mark.long
@given(damaged(SEEDS), st.none() | st.floats(0.1, 100))
@settings(max_examples=20_000)
def test_pictures_and_arrays_at_length(data: bytes, fps: float | None) -> None:
    hold([Upload(data, None, fps)])


def _clips(mp4: Callable[..., bytes]) -> list[bytes]:
    frames = np.random.default_rng(1).integers(0, 256, (6, 64, 96, 3), dtype=np.uint8)
    return [mp4(frames, codec=codec) for codec in ("libx264", "mpeg4", "libx265")]


@pytest.mark.parametrize("rounds", [10, pytest.param(400, marks=pytest.mark.long)])
def test_clips(mp4: Callable[..., bytes], rounds: int) -> None:
    """Twenty damaged files per decoder process, so that one file's damage could spoil the next; the last is whole."""
    seeds = _clips(mp4)
    rng, refusals = np.random.default_rng(rounds), list[str]()
    for _ in range(rounds):
        files = []
        for _ in range(20):
            data = bytearray(seeds[rng.integers(len(seeds))])
            for at in rng.integers(8, len(data), rng.integers(1, 12)):
                data[at] = rng.integers(256)
            files.append(Upload(bytes(data[: rng.integers(60, len(data))] if rng.random() < 0.2 else data)))
        limits = LIMITS.model_copy(update={"max_items": 32, "max_total_pixels": 10**7})
        try:
            *found, last = MediaDecoder(limits).run([*files, Upload(seeds[0])], [FrameSpec()])
        except ProblemError as problem:
            refusals.append(problem.code)
            continue
        assert isinstance(last, Clip)
        assert all(isinstance(m, Clip | ScoreFailure) for m in found)
    assert set(refusals) <= {"video_too_large"}
    assert len(refusals) < rounds


TENSORS = save({"media": PICTURE[None], "x": np.zeros((2, 3), np.float32)}, {"request": '{"items": [{}]}'})


@given(damaged([TENSORS]) | st.binary(max_size=100))
@settings(max_examples=500)
def test_our_safetensors_parser_accepts_nothing_that_the_library_refuses(body: bytes) -> None:
    try:
        _, found = parse(body, 1 << 20, 16)
    except Refused:
        return
    theirs = dict(deserialize(body))
    assert set(theirs) == set(found)
    for name, tensor in found.items():
        assert tuple(theirs[name]["shape"]) == tensor.shape
        assert bytes(theirs[name]["data"]) == bytes(tensor.data)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=8), st.tuples(st.sampled_from([np.uint8, np.float16, np.float32]), st.lists(st.integers(0, 5), max_size=5)), max_size=4
    )
)
def test_our_safetensors_parser_reads_what_the_library_writes(spec: dict[str, Any]) -> None:
    arrays = {name: np.random.default_rng(0).integers(0, 200, shape).astype(dtype) for name, (dtype, shape) in spec.items() if name != "__metadata__"}
    _, found = parse(save(arrays), 1 << 20, 16)
    assert {name: tensor.array().tolist() for name, tensor in found.items()} == {name: array.tolist() for name, array in arrays.items()}


def test_bfloat16_is_widened() -> None:
    header = json.dumps({"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    body = len(header).to_bytes(8, "little") + header + b"\x80\x3f\x20\xc1"
    assert parse(body, 1000, 4)[1]["a"].array().tolist() == [1.0, -10.0]
    with pytest.raises(SafetensorError):
        deserialize(body[:-1])
    with pytest.raises(Refused, match="holds 3"):
        parse(body[:-1], 1000, 4)


BODIES = {
    "application/json": json.dumps({"model": "ocr", "items": [{"prompt": "p", "image": "AAAA"}]}).encode(),
    "multipart/form-data; boundary=b": b"".join(
        b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n' % part
        for part in [(b"prompt", b"", b"p"), (b"combine", b"", b'{"weights": {"a": 1}}'), (b"reward", b"", b"a"), (b"file", b'; filename="f"', SEEDS[0])]
    )
    + b"--b--\r\n",
    "application/vnd.safetensors": TENSORS,
}


@given(st.sampled_from(sorted(BODIES)), st.data())
@settings(max_examples=500, suppress_health_check=[HealthCheck.too_slow])
def test_request_bodies(kind: str, data: st.DataObject) -> None:
    body = data.draw(damaged([BODIES[kind]]) | st.binary(max_size=200))
    call, status = None, 0
    try:
        call = parse_call(kind, body, LIMITS)
    except ProblemError as problem:
        status = problem.status
    if call is None:
        assert status in (400, 413, 422)
        return
    assert len(call.prompts) <= LIMITS.max_items
    assert len(call.fingerprint) == 64


@given(st.text(max_size=60))
def test_content_types(kind: str) -> None:
    with pytest.raises(ProblemError) as refused:
        parse_call(kind, b"", LIMITS)
    assert refused.value.status in (400, 415, 422)
