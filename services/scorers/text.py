"""The string half of the OCR reward: quoted target and recognised lines in, scores out. No engine, no pixels.

The rule is flow_grpo's (``flow_grpo/ocr.py::OcrScorer``), exact given the recognised lines:
target = text between the first two straight double quotes (an unclosed quote takes the rest of the prompt);
both sides lose their spaces and are lower-cased; lines are joined in reading order without separators;
distance = 0 if the target occurs anywhere in what was read, else Levenshtein, at most the target's length;
reward = 1 - distance / len(target).

Worked example: target "New York", read "Nev Yorkk": 2 edits on "newyork" (7) → 0.714286.

Where the original raises (no quote) or divides by zero (empty target) the item is a typed failure here.
"""

from __future__ import annotations

from collections.abc import Sequence

from rapidfuzz.distance import Levenshtein

from services.client.base import ItemScore, ScoreFailure

SUB_SCORES = ("flow_grpo", "exact_match", "strict")

NO_QUOTED_TEXT = "no_quoted_text"
EMPTY_TARGET = "empty_target"


def normalise(text: str) -> str:
    """Remove spaces (only U+0020) and lower-case, as the reference does."""
    return text.replace(" ", "").lower()


def quoted_target(prompt: str) -> str | ScoreFailure:
    """The normalised text the image should show, or why the prompt names none."""
    parts = prompt.split('"')
    if len(parts) < 2:
        return ScoreFailure(NO_QUOTED_TEXT, 'the prompt has no text in straight double quotes ("…")')
    return normalise(parts[1]) or ScoreFailure(EMPTY_TARGET, "the quoted text of the prompt is empty")


def score_text(target: str, lines: Sequence[str]) -> ItemScore:
    """Score recognised ``lines`` against a normalised, non-empty ``target``; every sub-score is in [0, 1].

    ``flow_grpo`` is the reward. ``exact_match`` and ``strict`` (1 - distance / longer length) also count what
    is read beyond the target, which the reward does not: watch them beside it.
    """
    read = normalise("".join(lines))
    distance = Levenshtein.distance(read, target)
    lenient = 0 if target in read else min(distance, len(target))
    reward = 1.0 - lenient / len(target)
    return ItemScore(
        reward=reward,
        sub_scores={
            "flow_grpo": reward,
            "exact_match": float(read == target),
            "strict": 1.0 - distance / max(len(read), len(target)),
        },
        text=" ".join(lines),
    )
