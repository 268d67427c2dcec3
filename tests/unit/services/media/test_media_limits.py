"""Uploads: every accepted format, every limit, and hostile or broken bytes."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from services.contract import ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.base import Media
from services.media.decode import MediaDecoder
from services.media.plan import MEDIA_INVALID, Upload

LIMITS = LimitsConfig(max_items=4, max_pixels=1000, max_total_pixels=3000)
PICTURE = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)


def decode_files(files: list[bytes], limits: LimitsConfig, **upload: Any) -> list[Any]:
    """Pixels [H, W, 3] of images, ``Media`` of clips, failures."""
    found = MediaDecoder(limits).run([Upload(data, **upload) for data in files], [])
    return [m.pixels if isinstance(m, Media) and not m.is_video else m for m in found]


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    if kind == "npy":
        np.save(buffer, image, **options)
    else:
        Image.fromarray(image).save(buffer, kind, **options)
    return buffer.getvalue()


def png_claiming(height: int, width: int) -> bytes:
    """A PNG of a few bytes whose header promises a huge picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + body + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "options"), [("npy", {}), ("PNG", {}), ("WEBP", {"lossless": True, "exact": True})])
def test_lossless_formats_arrive_exactly(kind: str, options: dict[str, Any]) -> None:
    (image,) = decode_files([encoded(PICTURE, kind, **options)], LIMITS)
    assert np.array_equal(np.asarray(image), PICTURE)


def test_jpeg_and_grey_become_rgb() -> None:
    jpeg, grey = decode_files([encoded(PICTURE, "JPEG", quality=95), encoded(PICTURE[..., 0], "PNG")], LIMITS)
    assert not isinstance(jpeg, ScoreFailure)
    assert jpeg.shape == (16, 48, 3)
    assert jpeg.dtype == np.uint8
    assert np.array_equal(np.asarray(grey), np.repeat(PICTURE[..., :1], 3, -1))


def test_an_npy_batch_counts_as_its_images() -> None:
    batch = np.stack([PICTURE, 255 - PICTURE])
    images = decode_files([encoded(batch, "npy"), encoded(PICTURE, "PNG")], LIMITS)
    assert [np.asarray(i).shape for i in images] == [(16, 48, 3)] * 3
    assert np.array_equal(np.asarray(images[1]), batch[1])


@pytest.mark.parametrize(
    ("files", "code"),
    [
        ([encoded(PICTURE, "PNG")] * 5, "too_many_items"),
        ([encoded(np.stack([PICTURE] * 5), "npy")], "too_many_items"),
        ([png_claiming(60000, 60000)], "image_too_large"),
        ([encoded(np.zeros((32, 48, 3), np.uint8), "npy")], "image_too_large"),
        ([encoded(np.stack([PICTURE] * 4), "npy")], "image_too_large"),
    ],
)
def test_acceptance_8_limits_refuse_the_request_before_decoding(files: list[bytes], code: str) -> None:
    with pytest.raises(ProblemError) as refused:
        decode_files(files, LIMITS)
    assert (refused.value.status, refused.value.code) == (413, code)


def _npy_with_header(header: str) -> bytes:
    body = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(body)) + body


@pytest.mark.parametrize(
    "bad",
    [
        b"",
        b"not an image",
        b"/etc/passwd",
        b"\x80\x04\x95pickle",
        encoded(np.array([{"a": 1}], dtype=object), "npy", allow_pickle=True),
        encoded(PICTURE.astype(np.float32), "npy"),
        encoded(PICTURE[..., 0], "npy"),
        encoded(np.asfortranarray(PICTURE), "npy"),
        encoded(PICTURE, "npy")[:-1],
        encoded(PICTURE, "npy") + b"x",
        encoded(PICTURE, "PNG")[:200],
        encoded(PICTURE, "GIF"),
        encoded(np.dstack([PICTURE, PICTURE[..., :1]]), "PNG"),
        _npy_with_header("{'descr': '|u1', 'fortran_order': False, 'shape': (99999999, 99999999, 3)}"),
        _npy_with_header("__import__('os').abort()"),
        encoded(PICTURE, "WEBP", save_all=True, append_images=[Image.fromarray(255 - PICTURE)], duration=100),
    ],
)
def test_broken_files_fail_alone(bad: bytes) -> None:
    good = encoded(PICTURE, "PNG")
    before, failed, after = decode_files([good, bad, good], LIMITS)
    assert isinstance(failed, ScoreFailure)
    assert failed.code == MEDIA_INVALID
    assert np.array_equal(np.asarray(before), PICTURE)
    assert np.array_equal(np.asarray(after), PICTURE)
    assert "/" not in failed.message
