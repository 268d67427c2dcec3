"""OCR scenes: the same prompt everywhere, nothing held out in training, a target that the reward finds."""

from __future__ import annotations

import hashlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.config import DataConfig, PromptConfig
from actors.sources.draws import held_out_prompts, prompt_source, training_example
from actors.sources.example import split_of
from actors.sources.ocr_scenes import MAX_PROMPT, MAX_TEXT, NUMBERS, SLOT, OCRScenesSource, scene_prompt
from actors.sources.scene_words import GRAMMAR, SCENES
from services.scorers.text import Target, quoted_target

MANY = [scene_prompt(0, number) for number in range(10_000)]


def test_prompts_never_change() -> None:
    """Recorded: another grammar or another way to choose would be another prompt set under the same name."""
    assert hashlib.blake2b("\n".join(MANY).encode(), digest_size=8).hexdigest() == "db992b7cfbe05f8d"
    assert MANY[0] == 'A scoreboard beside a canal displaying "Home 38 Away 1", a dusty wind, fallen leaves around it.'


def test_prompts_are_distinct_and_varied() -> None:
    assert len(set(MANY)) > 9_990
    assert len({prompt.split('"')[1] for prompt in MANY}) > 4_000
    assert not {*MANY[:2_000]} & {scene_prompt(1, number) for number in range(2_000)}


def test_every_list_is_used_and_every_scene_has_one_text() -> None:
    assert len(SCENES) >= 48
    assert all(scene.count('"') == 2 for scene in SCENES)
    assert all('"' not in entry for name, entries in GRAMMAR.items() if name != "scene" for entry in entries)
    named = {slot for entries in GRAMMAR.values() for entry in entries for slot in SLOT.findall(entry)}
    assert named | {"scene"} == set(GRAMMAR)
    assert all(len(set(entries)) == len(entries) for entries in GRAMMAR.values())


@given(seed=st.integers(0, 2**31), number=st.integers(0, NUMBERS - 1))
def test_the_reward_accepts_every_prompt(seed: int, number: int) -> None:
    prompt = scene_prompt(seed, number)
    target = quoted_target(prompt)
    assert isinstance(target, Target)
    assert 3 <= target.raw_length <= MAX_TEXT
    assert prompt.count('"') == 2
    assert len(prompt) <= MAX_PROMPT
    assert prompt.isascii()
    assert prompt.isprintable()
    assert "{" not in prompt
    assert not re.search(r"\b[Aa] [aeiou]", prompt)
    assert prompt == scene_prompt(seed, number)


def test_splits_are_disjoint_and_fixed() -> None:
    source = prompt_source(PromptConfig(kind="ocr_scenes"), DataConfig())
    dev, test = (held_out_prompts(source, split, n) for split, n in (("dev", 96), ("test", 512)))
    training = {training_example(source, 0, group).text for group in range(500)}
    assert (len(set(dev)), len(set(test))) == (96, 512)
    assert not training & {*dev, *test}
    assert not set(dev) & set(test)
    assert {split_of(prompt) for prompt in training} == {"train"}
    assert held_out_prompts(OCRScenesSource(), "test", 32) == test[:32]
    shares = [sum(split_of(prompt) == split for prompt in MANY) / len(MANY) for split in ("train", "dev", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.01)


def test_another_seed_has_other_prompts() -> None:
    one, other = (prompt_source(PromptConfig(kind="ocr_scenes", seed=seed), DataConfig()) for seed in (0, 1))
    assert training_example(one, 0, 0).text != training_example(other, 0, 0).text
