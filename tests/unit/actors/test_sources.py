"""Prompts and anchor data: pure functions of names, with nothing held out in the training set."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from actors.config import DataConfig, PromptConfig
from actors.sources.draws import data_source, held_out_batch, held_out_prompts, make_source, pixels_of, prompt_source, training_batch, training_example
from actors.sources.example import Example, Source, SourceError, split_of
from actors.sources.folder import FolderSource
from actors.sources.glyph import GlyphSource
from actors.sources.latents import clean_latents
from actors.sources.text import TextSource
from diffusion.codecs import IdentityCodec
from diffusion.families.glyph import signs

GLYPHS = SIGNS = GlyphSource()
LUMA = np.array([0.299, 0.587, 0.114])


# -- splits ---------------------------------------------------------------------------------------------------------


def test_a_prompts_split_never_changes() -> None:
    """Recorded: another hash would put test prompts of finished runs into training."""
    recorded = {'a sign that says "407"': "train", 'a sign that says "00"': "dev", 'a sign that says "15"': "test", "a blue house": "test", "": "train"}
    assert {prompt: split_of(prompt) for prompt in recorded} == recorded


def test_split_proportions() -> None:
    prompts = [signs.prompt_of(f"{i:04d}") for i in range(10_000)]
    shares = Counter(map(split_of, prompts))
    assert shares.keys() == {"train", "dev", "test"}
    assert shares["train"] == pytest.approx(8000, abs=150)
    assert shares["dev"] == pytest.approx(1000, abs=120)
    assert shares["test"] == pytest.approx(1000, abs=120)


@given(prompt=st.text())
def test_every_text_has_one_split(prompt: str) -> None:
    assert split_of(prompt) in ("train", "dev", "test")
    assert split_of(prompt) == split_of(prompt)


# -- prompts --------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt_file(tmp_path: Path) -> TextSource:
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(f"  prompt {i} " for i in range(60)) + "\n\nprompt 3\n")
    return TextSource(str(path))


def training_prompt(source: Source, seed: int, group: int) -> str:
    return training_example(source, seed, group).text


def test_training_prompts_are_pure_and_from_the_train_split(prompt_file: TextSource) -> None:
    for config in (GLYPHS, prompt_file):
        prompts = [training_prompt(config, 1, group) for group in range(40)]
        assert prompts == [training_prompt(config, 1, group) for group in range(40)]
        assert prompts != [training_prompt(config, 2, group) for group in range(40)]
        assert {split_of(p) for p in prompts} == {"train"}
        assert len(set(prompts)) > 15


def test_held_out_prompts_are_fixed_distinct_and_disjoint(prompt_file: TextSource) -> None:
    training = {training_prompt(GLYPHS, 0, group) for group in range(300)}
    dev, test = (held_out_prompts(GLYPHS, split, n) for split, n in (("dev", 96), ("test", 512)))
    assert (len(set(dev)), len(set(test))) == (96, 512)
    assert not training & {*dev, *test}
    assert not set(dev) & set(test)
    assert held_out_prompts(GLYPHS, "test", 32) == test[:32]  # a smaller evaluation asks a part of the same prompts
    for split in ("dev", "test"):
        assert {split_of(p) for p in held_out_prompts(prompt_file, split, 2)} == {split}


def test_asking_for_more_held_out_prompts_than_there_are(prompt_file: TextSource) -> None:
    there = sum(split_of(f"prompt {i}") == "test" for i in range(60))
    assert len(held_out_prompts(prompt_file, "test", there)) == there
    with pytest.raises(ValueError, match=f"only {there} distinct test prompts, {there + 1} were asked for"):
        held_out_prompts(prompt_file, "test", there + 1)


def test_prompt_file_refusals(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"prompt file .*missing.txt cannot be read: No such file"):
        TextSource(str(tmp_path / "missing.txt"))
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    with pytest.raises(ValueError, match=r"prompt file .*empty.txt holds no prompts"):
        TextSource(str(empty))
    held_out_only = tmp_path / "held.txt"
    held_out_only.write_text(next(p for p in (f"p{i}" for i in range(1000)) if split_of(p) == "test"))
    with pytest.raises(SourceError, match="the source has no example of the train split; add examples"):
        training_prompt(TextSource(str(held_out_only)), 0, 5)
    with pytest.raises(ValueError, match=r"prompts.kind=file needs prompts.path"):
        PromptConfig(kind="file")


# -- the glyph world ------------------------------------------------------------------------------------------------


def test_targets_have_two_to_four_digits_in_the_documented_shares() -> None:
    rng = np.random.default_rng(0)
    targets = [signs.draw_target(rng) for _ in range(4000)]
    assert all(re.fullmatch(r"\d{2,4}", t) for t in targets)
    lengths = Counter(map(len, targets))
    assert [lengths[n] / 4000 for n in (2, 3, 4)] == pytest.approx([0.1, 0.3, 0.6], abs=0.03)
    assert signs.prompt_of("07") == 'a sign that says "07"'


def luma(pixels: np.ndarray) -> np.ndarray:
    found: np.ndarray = pixels / 255 @ LUMA
    return found


@pytest.mark.parametrize(("height", "width"), [(16, 48), (32, 96)])
def test_every_sign_has_readable_contrast_and_ink(height: int, width: int) -> None:
    for seed in range(60):
        rng = np.random.default_rng(seed)
        picture = signs.render_sign(signs.draw_target(rng), rng, height, width)
        assert (picture.shape, picture.dtype) == ((height, width, 3), np.uint8)
        light = luma(picture)
        ground = np.median(light)
        ink = np.abs(light - ground) > 0.1
        assert light.max() - light.min() > 0.3, seed
        assert 0.03 < ink.mean() < 0.5, seed
        assert not ink[:, 0].any(), seed
        assert not ink[:, -1].any(), seed


def test_digits_stand_in_cells_and_look_alike_within_a_style() -> None:
    """With the same style, pictures of two targets differ exactly in the cells of the digits that differ."""
    a, b = (signs.render_sign(t, np.random.default_rng(5), 16, 48) for t in ("1234", "1834"))
    columns = np.flatnonzero((a != b).any((0, 2)))
    cell = 48 / 4.3
    assert columns.size
    assert columns.min() >= 24 - 1 * cell - 3
    assert columns.max() <= 24 + 3
    repeated = signs.render_sign("1234", np.random.default_rng(5), 16, 48)
    np.testing.assert_array_equal(a, repeated)


def test_styles_vary() -> None:
    pictures = np.stack([signs.render_sign("407", np.random.default_rng(seed), 16, 48) for seed in range(40)])
    grounds = pictures[:, 0, 0].astype(float) / 255
    assert grounds.std(0).min() > 0.15
    inverted = [np.median(luma(p)) > luma(p).mean() for p in pictures]
    assert 8 < sum(inverted) < 32  # dark on light and light on dark


# -- anchor data ----------------------------------------------------------------------------------------------------


def test_anchor_batches_are_pure_in_seed_batch_and_row() -> None:
    captions, pixels = training_batch(SIGNS, 0.0, 3, 7, 6, 16, 48)
    assert pixels.shape == (6, 16, 48, 3)
    again_captions, again = training_batch(SIGNS, 0.0, 3, 7, 6, 16, 48)
    assert captions == again_captions
    np.testing.assert_array_equal(pixels, again)
    shorter_captions, shorter = training_batch(SIGNS, 0.0, 3, 7, 2, 16, 48)
    assert shorter_captions == captions[:2]
    np.testing.assert_array_equal(shorter, pixels[:2])
    for seed, batch in ((4, 7), (3, 8)):
        assert training_batch(SIGNS, 0.0, seed, batch, 6, 16, 48)[0] != captions
    assert len(set(captions)) > 3
    everything = [picture.tobytes() for batch in range(4) for picture in training_batch(SIGNS, 0.0, 3, batch, 10, 16, 48)[1]]
    assert len(set(everything)) == 40  # no picture twice, neither within a batch nor in the next one


def test_held_out_anchors_are_never_trained_on() -> None:
    trained = {c for batch in range(4) for c in training_batch(SIGNS, 0.0, 0, batch, 40, 16, 48)[0]}
    for split in ("dev", "test"):
        captions, _ = held_out_batch(SIGNS, split, 40, 16, 48)
        assert {split_of(c) for c in captions} == {split}
        assert not trained & set(captions)
        assert held_out_batch(SIGNS, split, 3, 16, 48)[0] == captions[:3]
    assert {split_of(c) for c in trained} == {"train"}


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_caption_dropout_drops_that_share_and_leaves_the_pictures(share: float) -> None:
    captions, pixels = training_batch(SIGNS, share, 0, 0, 150, 16, 48)
    plain, same = training_batch(SIGNS, 0.0, 0, 0, 150, 16, 48)
    np.testing.assert_array_equal(pixels, same)
    assert all(c in ("", p) for c, p in zip(captions, plain, strict=True))
    assert captions.count("") / 150 == pytest.approx(share, abs=0.12 if 0 < share < 1 else 0)


@pytest.fixture
def picture_folder(tmp_path: Path) -> FolderSource:
    folder = tmp_path / "pictures"
    (folder / "sub").mkdir(parents=True)
    lines = []
    for i in range(30):
        name = f"sub/{i}.png"
        Image.new("RGB" if i % 2 else "L", (20 + i, 10), (i, 2 * i, 100) if i % 2 else i).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n\n")
    return FolderSource(str(folder))


def test_pictures_from_a_folder_keep_their_captions(picture_folder: FolderSource) -> None:
    captions, pixels = training_batch(picture_folder, 0.0, 0, 0, 20, 16, 48)
    assert (pixels.shape, pixels.dtype) == ((20, 16, 48, 3), np.uint8)
    for caption, picture in zip(captions, pixels, strict=True):
        i = int(caption.removeprefix("picture "))
        assert split_of(caption) == "train"
        assert {tuple(c) for c in picture.reshape(-1, 3).tolist()} == {(i, 2 * i, 100) if i % 2 else (i, i, i)}
    held_out, _ = held_out_batch(picture_folder, "test", 10, 16, 48)
    assert {split_of(c) for c in held_out} == {"test"}


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, r"anchor folder .* needs a metadata.jsonl with file_name and text on each line"),
        ("not json", "needs a metadata.jsonl"),
        ('{"file_name": "a.png"}', "needs a metadata.jsonl .*'text'"),
        ('"a.png"', "needs a metadata.jsonl"),
        ("\n", "lists no pictures"),
        ('{"file_name": "missing.png", "text": "TRAIN"}', r"missing.png"),
        ('{"file_name": "broken.png", "text": "TRAIN"}', r"broken.png"),
        ('{"file_name": "broken.png", "text": "HELD"}', "no example of the train split"),
    ],
)
def test_folder_refusals(metadata: str | None, message: str, tmp_path: Path) -> None:
    texts = {split: next(t for t in (f"t{i}" for i in range(1000)) if split_of(t) == split) for split in ("train", "test")}
    (tmp_path / "broken.png").write_bytes(b"not a picture")
    if metadata is not None:
        (tmp_path / "metadata.jsonl").write_text(metadata.replace("TRAIN", texts["train"]).replace("HELD", texts["test"]))
    with pytest.raises(ValueError, match=message):
        training_batch(FolderSource(str(tmp_path)), 0.0, 0, 0, 1, 16, 48)


def test_a_folder_source_needs_a_path() -> None:
    with pytest.raises(ValueError, match=r"data.kind=folder needs data.path"):
        DataConfig(kind="folder")


# -- one source of examples -------------------------------------------------------------------------------------------


def test_an_example_has_the_same_picture_at_every_look() -> None:
    example = training_example(GLYPHS, 3, 7)
    np.testing.assert_array_equal(example.pixels(16, 48), example.pixels(16, 48))
    np.testing.assert_array_equal(example.pixels(16, 48), training_example(GLYPHS, 3, 7).pixels(16, 48))


def test_prompts_are_the_captions_of_the_data_unless_named(picture_folder: FolderSource, tmp_path: Path) -> None:
    data = DataConfig(kind="folder", path=str(tmp_path / "pictures"))
    assert training_example(prompt_source(PromptConfig(), data), 0, 0).text.startswith("picture ")
    assert training_example(prompt_source(PromptConfig(kind="glyph"), data), 0, 0).text.startswith("a sign")
    assert isinstance(data_source(DataConfig()), GlyphSource)


def test_pictures_are_split_by_their_id(tmp_path: Path) -> None:
    """Without an id it is the caption, so that two pictures of one caption stand on one side."""
    ids = {split: next(f"i{n}" for n in range(1000) if split_of(f"i{n}") == split) for split in ("train", "test")}
    for name in ids.values():
        Image.new("RGB", (4, 4), (len(name), 0, 0)).save(tmp_path / f"{name}.png")
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{n}.png", "text": "the same words", "id": n}) + "\n" for n in ids.values()))
    source = FolderSource(str(tmp_path))
    assert {training_example(source, 0, g).id for g in range(10)} == {ids["train"]}
    assert held_out_prompts(source, "test", 1) == ["the same words"]


def test_a_text_has_no_picture(prompt_file: TextSource) -> None:
    with pytest.raises(SourceError, match=r"example 'prompt \d+' has a text only, and anchor data needs pictures"):
        training_batch(prompt_file, 0.0, 0, 0, 1, 16, 48)


def clip_file(path: Path, frames: int) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((16, 32, 3), 20 * i, np.uint8), format="rgb24")))
        container.mux(stream.encode())


def test_clips_of_a_folder_keep_their_frames(tmp_path: Path) -> None:
    clip_file(tmp_path / "a.mp4", 5)
    caption = next(t for t in (f"t{i}" for i in range(1000)) if split_of(t) == "train")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": caption}))
    pixels = training_batch(make_source("folder", str(tmp_path)), 0.0, 0, 0, 2, 8, 16)[1]
    assert pixels.shape == (2, 5, 8, 16, 3)
    assert np.diff(pixels[0].mean((1, 2, 3))).min() > 10  # in order
    (tmp_path / "a.mp4").write_bytes(b"no clip")
    with pytest.raises(SourceError, match=r"anchor clip .*a\.mp4 cannot be read"):
        training_batch(FolderSource(str(tmp_path)), 0.0, 0, 0, 1, 8, 16)


def test_clips_are_cut_to_the_frames_that_are_sampled() -> None:
    class Frames:
        def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
            return np.arange(7, dtype=np.uint8)[:, None, None, None].repeat(height, 1).repeat(width, 2).repeat(3, 3)

    class Still:
        def load(self, height: int, width: int, frames: int | None = None) -> NDArray[np.uint8]:
            return np.zeros((height, width, 3), np.uint8)

    clip, still = Example("c", "a clip", Frames()), Example("p", "a picture", Still())
    assert pixels_of([clip], 4, 6, 5)[0, :, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    assert pixels_of([clip], 4, 6).shape == (1, 7, 4, 6, 3)
    assert pixels_of([still, clip], 4, 6, 1).shape == (2, 1, 4, 6, 3)
    with pytest.raises(SourceError, match=r"example 'c' is a clip of 7 frames, sampler.frames is 9; lower it"):
        pixels_of([clip], 4, 6, 9)
    with pytest.raises(SourceError, match=r"example 'p' is a picture, sampler.frames is 5"):
        pixels_of([clip, still], 4, 6, 5)
    video = IdentityCodec(video=True)
    assert clean_latents([clip], video, 4, 6, 5).shape == (1, *video.latent_shape(4, 6, 5)) == (1, 3, 5, 4, 6)
