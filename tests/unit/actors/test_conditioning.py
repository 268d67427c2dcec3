"""What is shown of examples: who is given how many frames, of what they are made, and what is asked for once."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from actors.conditioning import Conditioner, Subject, Subjects, first_frames
from actors.config import DataConfig, PromptConfig
from actors.sources.example import Example, SourceError
from diffusion.codecs import IdentityCodec
from diffusion.config import SamplerConfig
from diffusion.engine.cache import PromptCache
from diffusion.families.frames import GivenFrames
from diffusion.families.glyph.text import GlyphTextEncoder

SAMPLER = SamplerConfig(height=4, width=6, frames=5, given_frames=(0, 1, 2))
WORDS = PromptConfig(kind="glyph")


@dataclass(frozen=True)
class Moving:
    """A clip whose frame t is t + `first` everywhere; a picture without `frames`."""

    first: int
    frames: int = 5

    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        shown = np.arange(self.first, self.first + self.frames, dtype=np.uint8)[:frames]
        return np.broadcast_to(shown[:, None, None, None], (len(shown), height, width, 3))


@dataclass(frozen=True)
class Still:
    def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
        return np.full((height, width, 3), 7, np.uint8)


@dataclass(frozen=True)
class Kept:
    """A clean latent whose frame t is t."""

    def load(self) -> NDArray[np.float32]:
        return np.broadcast_to(np.arange(5, dtype=np.float32)[None, :, None, None], (3, 5, 4, 6)).copy()


class Counted(GivenFrames):
    """Counts what it is asked for."""

    def __init__(self) -> None:
        super().__init__(IdentityCodec(video=True))
        self.asked: list[tuple[int, int]] = []

    def encode(self, pixels: np.ndarray, frames: int) -> dict[str, Tensor]:
        self.asked.append((len(pixels), frames))
        return super().encode(pixels, frames)


def conditioner(frames: Counted | None = None, picture: bool = False, max_bytes: int = 2**20) -> Conditioner:
    return Conditioner(PromptCache(GlyphTextEncoder.create()), frames, IdentityCodec(video=True), SAMPLER, picture, max_bytes)


def test_groups_and_rows_are_given_each_number_equally_often_whoever_asks() -> None:
    subjects, again = (Subjects(3, WORDS, DataConfig(), SAMPLER) for _ in range(2))
    groups = [subjects.given_to_group(g) for g in range(900)]
    rows = [subjects.given_to_row(b, r) for b in range(9) for r in range(100)]
    for found in (groups, rows):
        assert set(found) == {0, 1, 2}
        assert all(240 < count < 360 for count in Counter(found).values())
    assert groups == [again.given_to_group(g) for g in range(900)]
    assert groups != [Subjects(4, WORDS, DataConfig(), SAMPLER).given_to_group(g) for g in range(900)]
    assert groups[:100] != rows[:100]
    assert [subject.given for subject in subjects.held_out([Example("a", "a")] * 4, 4)] == [1, 2, 0, 1]


def test_a_groups_subject_is_its_example_and_a_ranks_is_the_same() -> None:
    subjects = Subjects(3, WORDS, DataConfig(), SAMPLER)
    made = subjects.group(5)
    assert made.example is not None
    assert made.text == made.example.text
    asked = subjects.of_group(5, made.text, torch.zeros(1))
    assert (asked.text, asked.given, asked.x0 is not None) == (made.text, made.given, True)
    if made.given:
        assert asked.example is not None
        assert asked.example.id == made.example.id
    none = SAMPLER.model_copy(update={"given_frames": 0})
    assert Subjects(3, WORDS, DataConfig(), none).of_group(5, "a").example is None  # no source is opened
    row = Subjects(3, WORDS, DataConfig(), SAMPLER).of_row(1, 2, "caption", torch.zeros(1))
    assert row.text == "caption"


def test_frames_of_files_are_encoded_once_and_stand_beside_the_text() -> None:
    frames = Counted()
    made, clip = conditioner(frames), Example("clip", 'a sign that says "12"', Moving(3))
    plain, one, two = made.get([Subject(clip.text, k, clip) for k in (0, 1, 2)])
    assert set(plain.tensors) == {"prompt_embeds", "pooled"}
    assert set(one.tensors) == {"prompt_embeds", "pooled", "given"}
    assert torch.equal(plain.prompt_embeds, one.prompt_embeds)
    assert two.tensors["given"].shape == (3, 2, 4, 6)
    torch.testing.assert_close(two.tensors["given"][0, :, 0, 0], torch.tensor([3.0, 4.0]) / 127.5 - 1)
    assert torch.equal(one.tensors["given"], two.tensors["given"][:, :1])
    assert frames.asked == [(1, 5), (2, 5)]
    again = made.get([Subject("", 2, clip), Subject(clip.text, 1, Example("other", "x", Moving(3)))])
    assert frames.asked == [(1, 5), (2, 5)]  # by pixels, whatever the text
    assert torch.equal(again[0].tensors["given"], two.tensors["given"])


def test_what_is_kept_is_bounded_and_the_oldest_leaves() -> None:
    frames = Counted()
    each = 3 * 4 * 6 * 4
    made = conditioner(frames, max_bytes=2 * each)
    for first in (1, 2, 1, 3, 1, 2):
        made.get([Subject("", 1, Example("a", "a", Moving(first)))])
    assert len(frames.asked) == 4  # 1 and 2, then 3 in the place of 2, then 2 again


def test_clean_latents_give_their_own_first_frames() -> None:
    frames = Counted()
    stored = Example("kept", "", latent=Kept())
    (found,) = conditioner(frames).get([Subject("", 2, stored)])
    assert found.tensors["given"][0, :, 0, 0].tolist() == [0.0, 1.0]
    (brought,) = conditioner(frames).get([Subject("", 1, stored, x0=torch.full((3, 5, 4, 6), 9.0))])
    assert brought.tensors["given"].unique().tolist() == [9.0]
    assert frames.asked == []


def test_a_picture_is_made_of_pixels_even_where_a_latent_is_at_hand() -> None:
    frames = Counted()
    clip = Example("clip", "", Moving(3))
    conditioner(frames, picture=True).get([Subject("", 1, clip, x0=torch.zeros(3, 5, 4, 6))])
    assert frames.asked == [(1, 5)]


def test_frames_that_an_example_does_not_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"example 'a' has a text only, and sampler\.given_frames asks for frames"):
        first_frames(Example("a", "a"), 1, 4, 6)
    with pytest.raises(SourceError, match="example 'p' is a picture, and 2 frames"):
        first_frames(Example("p", "p", Still()), 2, 4, 6)
    with pytest.raises(SourceError, match="example 'c' is a clip of 2 frames, and 3 frames"):
        first_frames(Example("c", "c", Moving(0, 2)), 3, 4, 6)
    assert first_frames(Example("p", "p", Still()), 1, 4, 6).shape == (1, 4, 6, 3)
    with pytest.raises(SourceError, match="a policy of pictures is given no frames"):
        conditioner(None).get([Subject("", 1, Example("c", "c", Moving(0)))])
