"""Pictures of any mode and size to pixels of one size, and files that are none."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from actors.preparing.cropping import MAX_PIXELS, BrokenMediaError, decode, fitted
from tests.mixed_pictures import KINDS, bomb, encoded, half, picture


@pytest.mark.parametrize(("suffix", "mode"), KINDS)
def test_odd_formats_and_modes_are_pictures(suffix: str, mode: str) -> None:
    image = decode(encoded(11, suffix, mode))
    assert (image.mode, image.size) == ("RGB", picture(11).size)
    assert np.asarray(image).std() > 10


def test_transparency_lies_on_white_and_sixteen_bits_keep_their_range() -> None:
    for mode in ("RGBA", "LA", "P"):
        image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
        out = io.BytesIO()
        image.convert(mode).save(out, "PNG", **({"transparency": 0} if mode == "P" else {}))
        assert (np.asarray(decode(out.getvalue())) == 255).all(), mode
    grey = np.asarray(decode(encoded(3, "png", "I;16")))[..., 0]
    np.testing.assert_array_equal(grey, np.asarray(picture(3, "L")))


def test_a_photo_is_turned_upright() -> None:
    image = Image.new("RGB", (30, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # turned by 90 degrees
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert decode(out.getvalue()).size == (20, 30)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is a text", "no picture of a known format"),
        (half(encoded(60)), "truncated"),
        (half(encoded(1, "jpg")), "(?i)truncated"),
        (half(encoded(1, "webp")), "."),
        (encoded(4).replace(b"IDAT", b"IDOT"), "."),
        (bomb(), "decompression bomb"),
        (bomb().replace((100_000).to_bytes(4, "big"), (9_999).to_bytes(4, "big")), "."),
    ],
)
def test_broken_files_say_why(data: bytes, reason: str) -> None:
    with pytest.raises(BrokenMediaError, match=reason) as error:
        decode(data)
    assert "0x" not in str(error.value)  # the reason is the same every time


def test_more_pixels_than_are_taken() -> None:
    side = int(MAX_PIXELS**0.5) + 1
    out = io.BytesIO()
    Image.new("1", (side, side)).save(out, "PNG")
    with pytest.raises(BrokenMediaError, match=f"{side}x{side} pixels, more than {MAX_PIXELS}"):
        decode(out.getvalue())


@pytest.mark.parametrize(("size", "target"), [((60, 20), (16, 16)), ((20, 60), (16, 48)), ((5, 5), (16, 48)), ((48, 16), (16, 48))])
def test_a_picture_covers_the_size_and_is_cropped_at_its_centre(size: tuple[int, int], target: tuple[int, int]) -> None:
    """Columns say how far left of the middle they are: after cropping, left and right are balanced and no edge is made up."""
    ramp = np.linspace(-100, 100, size[0]) + 128
    image = Image.fromarray(np.repeat(np.repeat(ramp[None, :, None], size[1], 0), 3, 2).round().astype(np.uint8))
    pixels = fitted(image, *target)
    assert (pixels.shape, pixels.dtype) == ((*target, 3), np.uint8)
    row = pixels[0, :, 0].astype(float)
    assert row[0] + row[-1] == pytest.approx(256, abs=3)
    shown = min(1.0, target[1] / target[0] * size[1] / size[0])  # of the width
    assert row[-1] - row[0] == pytest.approx(200 * shown, abs=200 / target[1] + 10)  # bicubic overshoots


def test_a_picture_of_the_size_is_left_as_it_is() -> None:
    image = picture(5)
    np.testing.assert_array_equal(fitted(image, image.height, image.width), np.asarray(image))
