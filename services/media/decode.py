"""All media of one request: sniff → check every size against the limits → decode.

Invariant: a limit refuses the whole request with 413 before pixels are allocated; a broken file fails alone, in its
place. No pickle, no archive, no path, no URL is ever followed.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

from services.contract import FrameSpec, ScoreFailure
from services.errors import ProblemError
from services.limits import LimitsConfig
from services.media.arrays import is_npy, plan_npy
from services.media.base import Media
from services.media.clips import Clip, ClipDecoder, is_clip
from services.media.pictures import is_picture, plan_picture
from services.media.plan import Plan, Refused, Upload, broken, invalid

Decoded = Media | Clip | ScoreFailure

_REFUSED = {
    b"PK\x03\x04": "zip archives (npz, torch files) are not accepted",
    b"\x80": "pickles are not accepted",
    b"\x1f\x8b": "compressed files are not accepted",
}
_KNOWN = "not a readable PNG, JPEG, WebP, npy or mp4 file"


class MediaDecoder:
    """Decodes the uploads of one request. ``run`` works in a thread; ``cancel`` ends it early from any other."""

    def __init__(self, limits: LimitsConfig) -> None:
        self._limits = limits
        self._clips = ClipDecoder(limits)
        self._cancelled = threading.Event()

    def run(self, uploads: Sequence[Upload], specs: Sequence[FrameSpec]) -> list[Decoded]:
        """Items of all uploads in order; of an mp4 file only the frames that ``specs`` look at. Raises ``ProblemError`` 413."""
        return self.decode([plan(upload) for upload in uploads], specs)

    def decode(self, plans: Sequence[Plan], specs: Sequence[FrameSpec]) -> list[Decoded]:
        """As ``run``, for uploads that are planned already."""
        check(plans, self._limits)
        budget = self._limits.max_total_pixels - sum(p.pixels for p in plans)
        out: list[Decoded] = []
        try:
            for p in plans:
                if self._cancelled.is_set():
                    out.append(invalid("the request was given up"))
                elif p.failure is not None:
                    out.extend([p.failure] * p.items)
                elif p.clip is not None:
                    clip = self._clips.decode(p.clip, specs, budget)
                    budget -= 0 if isinstance(clip, ScoreFailure) else clip.frames.size // 3
                    out.append(clip)
                else:
                    out.extend(_pixels(p))
        finally:
            self._clips.close()
        return out

    def cancel(self) -> None:
        """Make ``run`` end soon; its answer is of no use then."""
        self._cancelled.set()
        self._clips.kill()


def plan(upload: Upload) -> Plan:
    """Sniff ``upload`` and read its header only. Raises ``ProblemError`` for a decompression bomb."""
    data = upload.data
    try:
        if is_clip(data):
            found = Plan(1, clip=data)
        elif is_npy(data):
            found = plan_npy(upload)
        elif is_picture(data):
            found = plan_picture(data)
        else:
            raise Refused(next((why for magic, why in _REFUSED.items() if data.startswith(magic)), _KNOWN))
    except (Refused, ProblemError) as refusal:
        if isinstance(refusal, ProblemError):
            raise
        return broken(str(refusal))
    except Exception:  # parsers raise many kinds on damaged bytes
        return broken(_KNOWN)
    if upload.kind is not None and upload.kind != ("video" if found.clip is not None or upload.fps is not None else "image"):
        return broken(f"this is not {'an' if upload.kind == 'image' else 'a'} {upload.kind}; an npy clip needs fps")
    return found


def check(plans: Sequence[Plan], limits: LimitsConfig) -> None:
    """Refuse a request that would allocate more than ``limits`` allow."""
    items = sum(p.items for p in plans)
    if items > limits.max_items:
        raise ProblemError(413, "too_many_items", f"{items} items, at most {limits.max_items} per request")
    for i, p in enumerate(plans):
        if p.height * p.width > limits.max_pixels:
            raise ProblemError(413, "image_too_large", f"file {i} has {p.height}x{p.width} pixels, at most {limits.max_pixels} per image")
        if p.frames > limits.max_frames:
            raise ProblemError(413, "video_too_large", f"file {i} has {p.frames} frames, at most {limits.max_frames} per clip")
    total = sum(p.pixels for p in plans)
    if total > limits.max_total_pixels:
        raise ProblemError(413, "image_too_large", f"{total} pixels in all, at most {limits.max_total_pixels} per request")


def _pixels(p: Plan) -> list[Decoded]:
    if p.decode is None:
        return [invalid("nothing to decode")] * p.items
    try:
        return list(p.decode())
    except Exception as error:  # codecs raise many kinds on damaged bytes
        return [invalid(f"the file is damaged ({type(error).__name__})")] * p.items
