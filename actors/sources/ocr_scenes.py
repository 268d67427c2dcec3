"""Prompts for the OCR reward on real image models: a scene in one sentence, with one text in double quotes.

A prompt is a pure function of (seed, number), written by a grammar of its own templates and word lists. The quoted text is printable
ASCII and holds no quote, so that the reward finds its target; at most `MAX_TEXT` characters of at most `MAX_PROMPT`, which fits the
77 tokens of CLIP. Choices are digits of a hash, so no library's random generator can change a prompt.

Worked example: `scene_prompt(0, 0)` is
    A scoreboard beside a canal displaying "Home 38 Away 1", a dusty wind, fallen leaves around it.
on every machine; its target is what stands in quotes.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np

from actors.sources.example import Example
from actors.sources.scene_words import GRAMMAR

MAX_TEXT = 28
"""Characters of a quoted text."""
MAX_PROMPT = 220
"""Characters of a prompt."""
NUMBERS = 2**40
"""Numbers that a source draws from."""
SLOT = re.compile(r"\{(\w+)\}")


class _Choices:
    """Choices that a name makes, one after another."""

    def __init__(self, name: str) -> None:
        self._left = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=64).digest(), "little")

    def of(self, options: tuple[str, ...]) -> str:
        self._left, index = divmod(self._left, len(options))
        return options[index]


def scene_prompt(seed: int, number: int) -> str:
    """Prompt `number` of `seed`."""
    choices = _Choices(f"ocr_scenes/{seed}/{number}")
    text = "{scene}"
    while slot := SLOT.search(text):  # leftmost first, so that the order of choices is that of the words
        text = text[: slot.start()] + choices.of(GRAMMAR[slot.group(1)]) + text[slot.end() :]
    return text


class OCRScenesSource:
    """Endless scenes of one seed; the text is the id, so a text stands in one split however often it is drawn."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def draw(self, rng: np.random.Generator) -> Example:
        text = scene_prompt(self.seed, int(rng.integers(NUMBERS)))
        return Example(text, text)
