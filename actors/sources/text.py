"""A file of prompts, one a line."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np

from actors.sources.example import Example, SourceError


@lru_cache(maxsize=8)
def prompt_lines(path: str) -> tuple[str, ...]:
    """Prompts of a file; empty lines and repetitions are left out. Raises SourceError naming the file."""
    try:
        lines = tuple(dict.fromkeys(line.strip() for line in Path(path).read_text().splitlines() if line.strip()))
    except OSError as error:
        raise SourceError(f"prompt file {path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise SourceError(f"prompt file {path} is not a text file") from None
    if not lines:
        raise SourceError(f"prompt file {path} holds no prompts")
    return lines


class TextSource:
    """Texts without media; the text is the id. Raises SourceError for a file that cannot be used."""

    def __init__(self, path: str) -> None:
        self.examples = tuple(Example(text, text) for text in prompt_lines(path))

    def draw(self, rng: np.random.Generator) -> Example:
        return self.examples[int(rng.integers(len(self.examples)))]
