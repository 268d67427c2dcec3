"""The string half of the OCR reward: quoted target and recognised lines in, scores out. No engine, no pixels.

Common to all rules: target = text between the first two straight double quotes (an unclosed quote takes the rest of the
prompt); both sides lose their spaces and are lower-cased; lines are joined in reading order without separators; d is the
Levenshtein distance. Each rule is exact given the recognised lines:

``flow_grpo``  (``flow_grpo/ocr.py::OcrScorer``) d = 0 if the target occurs anywhere in what was read, else at most the
               target's length; 1 - d / length of the target.
``cosmos``     (cosmos-rl ``reward_service/…/model/ocr.py``) the same d, divided by the target's length *with* its spaces:
               a blank picture scores 0.0909 for "Hello World".
``strict``     1 - d / longer length, without the exemption: text beyond the target counts against it.

Clips: ``flow_grpo`` follows ``OcrScorer_video_or_image``: per frame without the substring exemption, then the mean over
frames whose value is above 0, 0 if there is none. cosmos-rl has no rule for clips; here it is flow_grpo's with cosmos-rl's
divisor. ``strict``, ``exact_match`` and ``character_iou`` take the worst frame.

Worked example: target "New York", read "Nev Yorkk": 2 edits on "newyork" (7) → flow_grpo 5/7, cosmos 6/8, strict 6/8.

Where the originals raise (no quote), divide by zero or grant 1.0 (empty target), the item is a typed failure here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rapidfuzz.distance import Levenshtein

from services.contract import ItemScore, ScoreFailure

SUB_SCORES = ("flow_grpo", "cosmos", "strict", "exact_match", "character_iou")

NO_QUOTED_TEXT = "no_quoted_text"
EMPTY_TARGET = "empty_target"


@dataclass(frozen=True)
class Target:
    """The text a picture should show: ``text`` normalised and not empty, ``raw_length`` its length as quoted."""

    text: str
    raw_length: int


def normalise(text: str) -> str:
    """Remove spaces (only U+0020) and lower-case, as the references do."""
    return text.replace(" ", "").lower()


def quoted_target(prompt: str) -> Target | ScoreFailure:
    """The text that the prompt asks for, or why it names none."""
    parts = prompt.split('"')
    if len(parts) < 2:
        return ScoreFailure(NO_QUOTED_TEXT, 'the prompt has no text in straight double quotes ("…")')
    text = normalise(parts[1])
    return Target(text, len(parts[1])) if text else ScoreFailure(EMPTY_TARGET, "the quoted text of the prompt is empty")


def score_text(target: Target, lines: Sequence[str], mode: str = "flow_grpo") -> ItemScore:
    """Score the recognised ``lines`` of one image; ``mode`` names the sub-score that is the reward.

    Every sub-score is at most 1, and at least 0 as long as lower-casing does not lengthen the target.
    """
    read = normalise("".join(lines))
    scores = _frame_scores(target, read, exempt=target.text in read)
    return ItemScore(scores[mode], scores, " ".join(lines))


def score_clip_text(target: Target, frames: Sequence[Sequence[str]], mode: str = "flow_grpo") -> ItemScore:
    """Score the recognised lines of each frame of a clip (at least one frame); ``text`` is that of the worst frame."""
    each = [_frame_scores(target, normalise("".join(lines)), exempt=False) for lines in frames]
    scores = {name: _mean_of_positive([s[name] for s in each]) if name in ("flow_grpo", "cosmos") else min(s[name] for s in each) for name in SUB_SCORES}
    worst = min(range(len(each)), key=lambda i: each[i]["strict"])
    return ItemScore(scores[mode], scores, " ".join(frames[worst]))


def _frame_scores(target: Target, read: str, exempt: bool) -> dict[str, float]:
    length = len(target.text)
    distance = Levenshtein.distance(read, target.text)
    lenient = 0 if exempt else min(distance, length)
    return {
        "flow_grpo": 1.0 - lenient / length,
        "cosmos": 1.0 - lenient / target.raw_length,
        "strict": 1.0 - distance / max(len(read), length),
        "exact_match": float(read == target.text),
        "character_iou": _overlap(target.text, read),
    }


def _overlap(a: str, b: str) -> float:
    """Characters in common over characters in all, with multiplicity: blind to order."""
    one, two = Counter(a), Counter(b)
    return (one & two).total() / (one | two).total()


def _mean_of_positive(values: Sequence[float]) -> float:
    positive = [value for value in values if value > 0]
    return sum(positive) / len(positive) if positive else 0.0
