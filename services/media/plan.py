"""What is known of an upload before its pixels are decoded.

Lifecycle: an ``Upload`` is sniffed by its magic bytes and only its header is read → ``Plan`` (sizes, or why it cannot be
read) → limits are checked over all plans → ``decode``. A limit refuses the whole request; a broken file fails alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from services.contract import ScoreFailure
from services.media.base import Media

MEDIA_INVALID = "media_invalid"


class Refused(ValueError):
    """A readable header that asks for something not accepted; the text may go to the client."""


@dataclass(frozen=True)
class Upload:
    """One file as it came. ``fps`` makes an npy file a clip; ``kind`` is what the client said it is, if it did."""

    data: bytes
    kind: str | None = None
    fps: float | None = None
    selected: bool = False


@dataclass(frozen=True)
class Plan:
    """One upload, header read: ``items`` items of ``frames`` frames of ``height`` x ``width``, or ``failure``.

    ``clip`` marks an mp4 file: nothing in this process looks into it, its sizes are found by the process that decodes it.
    """

    items: int
    frames: int = 0
    height: int = 0
    width: int = 0
    decode: Callable[[], list[Media]] | None = None
    failure: ScoreFailure | None = None
    clip: bytes | None = None

    @property
    def pixels(self) -> int:
        """Pixels that decoding allocates, over all items and frames."""
        return self.items * self.frames * self.height * self.width


def invalid(reason: str) -> ScoreFailure:
    """The failure of one item whose file cannot be used."""
    return ScoreFailure(MEDIA_INVALID, reason)


def broken(reason: str, items: int = 1) -> Plan:
    """The plan of an upload that cannot be used."""
    return Plan(items, failure=invalid(reason))
