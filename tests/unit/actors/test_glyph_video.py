"""The glyph world in motion: clips that are exact, drawn by name alone, and judged as they should be by the rewards of the recipes."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from actors.config import DataConfig, PromptConfig
from actors.sources.draws import data_source, held_out_prompts, pixels_of, prompt_source, training_example, training_rows
from actors.sources.example import Example, SourceError
from actors.sources.glyph import GlyphVideoSource, MovingNumber
from diffusion.families.glyph import moving
from services.contract import ItemScore
from services.media.base import Media
from services.scorers.motion import MotionScorer
from services.scorers.ocr import OcrScorer
from services.scorers.settings import MotionReward, OcrReward

SOURCE = GlyphVideoSource()
ORDER = (1, -1, 0)


def drawn(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [SOURCE.draw(rng) for _ in range(count)]


def shown(example: Example) -> str:
    """What a caption without errors says of a clip."""
    assert isinstance(example.media, MovingNumber)
    return moving.prompt_of(example.media.number, example.media.direction)


def test_numbers_and_directions_in_their_shares() -> None:
    rng = np.random.default_rng(0)
    found = [moving.draw_number(rng) for _ in range(4000)]
    lengths, directions = Counter(len(number) for number, _ in found), Counter(direction for _, direction in found)
    assert [lengths[n] / 4000 for n in (2, 3)] == pytest.approx([0.1, 0.9], abs=0.03)
    assert [directions[d] / 4000 for d in moving.STEP] == pytest.approx([0.25] * 4, abs=0.03)
    assert moving.prompt_of("07", "up") == 'the number "07" moving up'


def test_captions_err_in_their_shares() -> None:
    rng = np.random.default_rng(0)
    said = [moving.captioned("407", "left", rng) for _ in range(4000)]
    for place, digit in enumerate("407"):
        digits = Counter(number[place] for number, _ in said)
        assert digits[digit] / 4000 == pytest.approx(1 - moving.MISREAD, abs=0.03)
        assert [digits[other] / 4000 for other in "0123456789" if other != digit] == pytest.approx([moving.MISREAD / 9] * 9, abs=0.01)
    directions = Counter(direction for _, direction in said)
    assert directions["left"] / 4000 == pytest.approx(1 - moving.MISDIRECTED, abs=0.03)
    assert [directions[other] / 4000 for other in ("right", "up", "down")] == pytest.approx([moving.MISDIRECTED / 3] * 3, abs=0.02)


def test_a_caption_errs_about_its_clip_and_both_are_of_one_world() -> None:
    examples = drawn(400)
    assert 0.34 < np.mean([shown(example) == example.text for example in examples]) < 0.56  # 0.45
    lengths = Counter(len(example.text.split('"')[1]) for example in examples)
    assert lengths[3] / 400 == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize("direction", moving.STEP)
def test_every_frame_is_the_one_before_shifted(direction: str) -> None:
    """To the bit; what comes in at the edges is ground."""
    right, down = moving.STEP[direction]
    old = (slice(None, -1), slice(1, None), slice(None))  # what stays in the picture, by the sign of a shift: +1, -1, 0
    new = (slice(1, None), slice(None, -1), slice(None))
    came = {1: slice(0, 1), -1: slice(-1, None)}
    for seed in range(40):
        rng = np.random.default_rng(seed)
        number, _ = moving.draw_number(rng)
        clip = moving.render_clip(number, direction, rng, 12, 32)
        assert (clip.shape, clip.dtype) == ((moving.FRAMES, 12, 32, 3), np.uint8)
        for a, b in itertools.pairwise(clip):
            np.testing.assert_array_equal(a[old[ORDER.index(down)], old[ORDER.index(right)]], b[new[ORDER.index(down)], new[ORDER.index(right)]])
            edge = b[came[down]] if down else b[:, came[right]]
            assert (edge == clip[0, 0, 0]).all()


def test_a_first_frame_does_not_tell_where_its_number_goes() -> None:
    for seed in range(5):
        first = [moving.render_clip("407", direction, np.random.default_rng(seed), 12, 32)[0] for direction in moving.STEP]
        assert all(np.array_equal(frame, first[0]) for frame in first)


def test_a_larger_clip_is_drawn_larger() -> None:
    clip = moving.render_clip("407", "down", np.random.default_rng(0), 24, 64)
    assert clip.shape == (moving.FRAMES, 24, 64, 3)
    ink = np.abs(clip[0].astype(int) - clip[0, 0, 0]).sum(-1) > 60
    assert 29 <= np.flatnonzero(ink.any(0)).size <= 43  # a font of two thirds of the height


def test_an_example_looks_the_same_every_time_and_goes_by_its_text() -> None:
    for example in drawn(5):
        assert example.id == example.text
        np.testing.assert_array_equal(example.pixels(12, 32), example.pixels(12, 32))
    rows = training_rows(SOURCE, 0.0, 3, 7, 6)
    again = training_rows(SOURCE, 0.0, 3, 7, 6)
    assert [caption for caption, _ in rows] == [caption for caption, _ in again]
    np.testing.assert_array_equal(pixels_of([e for _, e in rows], 12, 32, 5), pixels_of([e for _, e in again], 12, 32, 5))
    assert {e.split for _, e in rows} == {"train"}


def test_there_are_enough_prompts_for_the_recipes() -> None:
    dev, test = held_out_prompts(SOURCE, "dev", 96), held_out_prompts(SOURCE, "test", 432)
    assert not {*dev} & {*test}
    assert training_example(SOURCE, 0, 0).text not in {*dev, *test}


def test_it_goes_by_its_kind_without_a_path() -> None:
    assert isinstance(data_source(DataConfig(kind="glyph_video")), GlyphVideoSource)
    assert isinstance(prompt_source(PromptConfig(kind="glyph_video"), DataConfig()), GlyphVideoSource)
    assert isinstance(prompt_source(PromptConfig(), DataConfig(kind="glyph_video")), GlyphVideoSource)


def test_a_clip_longer_than_the_world_s_is_refused() -> None:
    assert pixels_of(drawn(2), 12, 32, 3).shape == (2, 3, 12, 32, 3)
    with pytest.raises(SourceError, match=r"a clip of 5 frames, sampler.frames is 9"):
        pixels_of(drawn(1), 12, 32, 9)


def test_the_rewards_of_the_recipes_see_what_was_rendered() -> None:
    """Real OCR reads the worst frame of nearly every clip, and every clip moves as it says, and not otherwise."""
    examples = drawn(400)
    media = [Media(example.pixels(12, 32), 8.0) for example in examples]
    texts = [shown(example) for example in examples]
    read = OcrScorer(OcrReward(mode="strict", frame_stride=2)).score(texts[:60], media[:60])
    assert np.mean([score.reward for score in read if isinstance(score, ItemScore)]) > 0.97
    scorer = MotionScorer(MotionReward())
    own = np.array([score.reward for score in scorer.score(texts, media) if isinstance(score, ItemScore)])
    turned = [text.rpartition(" ")[0] + " " + {"left": "up", "up": "right", "right": "down", "down": "left"}[text.split()[-1]] for text in texts]
    other = [score.reward for score in scorer.score(turned, media) if isinstance(score, ItemScore)]
    assert len(own) == len(other) == len(examples)
    assert np.mean(own > 0.7) > 0.99  # what leaves the picture at the top or bottom costs two of them more
    assert own.min() > 0.64
    assert own.mean() > 0.9
    assert max(other) < 0.2
