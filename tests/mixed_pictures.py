"""A folder of mixed pictures as teams have them: formats, modes and sizes of all kinds, and seven that are broken, each in its own way."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {
    "truncated.jpg": "runcated",
    "text.png": "no picture of a known format",
    "empty.webp": "the file is empty",
    "missing.png": "No such file or directory",
    "bomb.png": "decompression bomb",
    "truncated.png": "runcated",
    "no-caption.png": "no caption",
}
"""Broken files by name, and what must be said of them."""

KINDS = [
    *(("png", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")),
    *(("jpg", mode) for mode in ("RGB", "L", "CMYK")),
    *(("webp", "RGB"), ("webp", "RGBA"), ("bmp", "RGB"), ("gif", "P"), ("tif", "RGB"), ("tif", "CMYK")),
]
"""Formats and modes of good pictures."""
FORMATS = {"jpg": "JPEG", "tif": "TIFF"}


def picture(number: int, mode: str = "RGB") -> Image.Image:
    """A gradient whose colours and size follow from `number`."""
    width, height = 20 + 7 * number % 90, 16 + 11 * number % 70
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    image = Image.fromarray(np.stack([x, y, np.full_like(x, 40 + number * 13 % 200)], -1).astype(np.uint8))
    if mode == "I;16":
        return Image.fromarray((np.asarray(image.convert("L"), np.uint16) * 257).astype(np.uint16))
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.fromarray(y.astype(np.uint8)))
    return image.convert(mode)


def encoded(number: int, suffix: str = "png", mode: str = "RGB") -> bytes:
    """Such a picture as a file."""
    out = io.BytesIO()
    picture(number, mode).save(out, FORMATS.get(suffix, suffix.upper()))
    return out.getvalue()


def half(data: bytes) -> bytes:
    return data[: len(data) * 2 // 3]


def bomb() -> bytes:
    """A PNG of a few bytes that says it is 100000 pixels high and wide."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def write_folder(folder: Path, count: int) -> Path:
    """`count` pictures with metadata.jsonl, the seven broken ones spread among them."""
    folder.mkdir(parents=True)
    lines = []
    for number in range(count - len(BROKEN)):
        suffix, mode = KINDS[number % len(KINDS)]
        name = f"{number % 3}/{number:04d}.{suffix}"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(number, suffix, mode))
        lines.append({"file_name": name, "text": f"gradient {number} in {mode}"})
    bad = {
        "truncated.jpg": half(encoded(1, "jpg")),
        "text.png": b"this is a text\n",
        "empty.webp": b"",
        "bomb.png": bomb(),
        "truncated.png": half(encoded(60)),
        "no-caption.png": encoded(2),
    }
    for name, data in bad.items():
        (folder / name).write_bytes(data)
    for i, name in enumerate(BROKEN):
        lines.insert((i + 1) * len(lines) // (len(BROKEN) + 1), {"file_name": name, "text": "" if name == "no-caption.png" else f"broken {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder
