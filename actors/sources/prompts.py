"""Prompts: which prompt group g has, and which prompts are held out.

A prompt's split is a function of its text alone (80 % train, 10 % dev, 10 % test), so no list of held-out prompts can
drift away from the training set. The prompt of a group is a function of (run seed, group).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from actors.config import PromptConfig
from diffusion.families.glyph import signs
from diffusion.seeds import key


def split_of(prompt: str) -> str:
    """`train`, `dev` or `test`, by a hash of the text."""
    bucket = hashlib.blake2b(prompt.encode(), digest_size=4).digest()
    share = int.from_bytes(bucket, "little") / 2**32
    return "train" if share < 0.8 else "dev" if share < 0.9 else "test"


@lru_cache(maxsize=8)
def prompt_lines(path: str) -> tuple[str, ...]:
    """Prompts of a file, one a line; empty lines and repetitions are left out. Raises ValueError naming the file."""
    try:
        lines = tuple(dict.fromkeys(line.strip() for line in Path(path).read_text().splitlines() if line.strip()))
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read: {error.strerror}") from None
    if not lines:
        raise ValueError(f"prompt file {path} holds no prompts")
    return lines


def _draws(config: PromptConfig, *name: int | str) -> Iterator[str]:
    """Endless prompts of the source, named by `name`."""
    rng = np.random.default_rng(key(*name))
    if config.kind == "glyph":
        while True:
            yield signs.prompt_of(signs.draw_target(rng))
    lines = prompt_lines(str(config.path))
    while True:
        yield lines[int(rng.integers(len(lines)))]


def _first(draws: Iterator[str], split: str, what: str) -> str:
    for _, prompt in zip(range(100_000), draws, strict=False):
        if split_of(prompt) == split:
            return prompt
    raise ValueError(f"no {split} prompt found for {what}; add prompts")


def training_prompt(config: PromptConfig, seed: int, group: int) -> str:
    """Prompt of group `group` of the run `seed`, from the train split."""
    return _first(_draws(config, seed, "prompt", group), "train", f"group {group}")


def held_out_prompts(config: PromptConfig, split: str, n: int) -> list[str]:
    """`n` distinct prompts of `split`, the same for every run. Raises ValueError when the source has fewer."""
    found: dict[str, None] = {}
    for _, prompt in zip(range(200 * n + 100_000), _draws(config, "held-out", split), strict=False):
        if split_of(prompt) == split:
            found[prompt] = None
            if len(found) == n:
                return list(found)
    raise ValueError(f"the prompt source has only {len(found)} distinct {split} prompts, {n} were asked for; lower evaluation.*_prompts")
