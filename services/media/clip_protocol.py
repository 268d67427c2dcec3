"""What the service and the process that decodes mp4 files say to each other over a pair of pipes.

A message is a 4-byte little-endian length, that much JSON, then raw bytes whose number the JSON fixes: the file on the
way in, uint8 RGB frames on the way out. Both sides know how much comes before they read it; nothing is pickled.
"""

from __future__ import annotations

from typing import BinaryIO, Literal

from pydantic import Field

from services.contract import FrameSpec, StrictModel

MAX_MESSAGE = 1 << 20


class ClipOrder(StrictModel):
    """Decode the ``size`` bytes that follow and send the frames that any of ``specs`` looks at."""

    size: int = Field(ge=0)
    specs: list[FrameSpec]
    max_pixels: int
    max_frames: int
    max_total_pixels: int
    max_video_frames: int
    cpu_s: float


class ClipReply(StrictModel):
    """The frames that follow (``len(indices)`` of height x width x 3 bytes), or why there are none."""

    fps: float = Field(default=0.0, ge=0, le=1000, allow_inf_nan=False)
    total: int = Field(default=0, ge=0)
    indices: list[int] = Field(default_factory=list)
    height: int = Field(default=0, ge=0)
    width: int = Field(default=0, ge=0)
    trouble: Literal["invalid", "too_large"] | None = None
    message: str = Field(default="", max_length=300)


def write_message(stream: BinaryIO, message: StrictModel) -> None:
    """Write the JSON half of a message."""
    text = message.model_dump_json().encode()
    stream.write(len(text).to_bytes(4, "little") + text)


def read_message(stream: BinaryIO) -> bytes:
    """Read the JSON half of a message. Raises ``EOFError`` when the other side is gone or talks nonsense."""
    head = stream.read(4)
    length = int.from_bytes(head, "little")
    text = stream.read(length) if len(head) == 4 and length <= MAX_MESSAGE else b""
    if not text or len(text) != length:
        raise EOFError("no message")
    return text
