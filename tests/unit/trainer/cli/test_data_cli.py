"""`ddrl prepare-data` and `ddrl data inspect`: how they say no, and a set that needs no more work."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from actors.prepared import read_header, read_manifest, shard_file
from actors.preparing import pipeline
from actors.preparing.clips import decode_clip
from actors.preparing.pipeline import ClipWriter, Preparation, ShardWriter, begun, read_slice
from actors.sources.prepared import PreparedSource
from diffusion.checkpoint import load_codec
from diffusion.families.wan.tiny import write_tiny
from tests import mixed_clips
from tests.mixed_clips import FRAMES
from tests.mixed_pictures import write_folder
from trainer.cli.main import app

BASE = Path(__file__).parents[4] / "recipes" / "glyph-base"


def ddrl(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.stdout, done.stderr


def prepare(source: Path, out: Path, *options: str) -> tuple[int, str, str]:
    return ddrl("prepare-data", str(source), str(out), "--model", str(BASE), "--shard-rows", "16", *options)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "source", 40)


def write_shards(source: Path, out: Path) -> None:
    """What Ray Data's workers would have written."""
    work = begun(Preparation(source, out, BASE, 16, 48, shard_rows=16))
    writer = ShardWriter(work.preparation, "cpu")
    for number in work.missing:
        writer.write(number, *read_slice(work.reader, work.slices[number], 16, 48))


def test_a_set_whose_shards_are_all_there_is_finished_without_ray(source: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "set")
    code, stdout, stderr = prepare(source, tmp_path / "set", "--size", "16x48", "--max-broken", "0.2")
    assert (code, stderr) == (0, "")
    assert "33 examples" in stdout
    assert "in 3 shards, 7 broken inputs left out" in stdout
    code, stdout, stderr = ddrl("data", "inspect", str(tmp_path / "set"), "--out", str(tmp_path / "grid.png"), "-n", "9")
    assert (code, stderr) == (0, "")
    assert "33 examples: " in stdout
    assert "broken inputs: 7" in stdout
    assert (tmp_path / "grid.png").exists()


def test_too_much_broken_is_a_failure_with_status_1(source: Path, tmp_path: Path) -> None:
    write_shards(source, tmp_path / "set")
    code, _, stderr = prepare(source, tmp_path / "set", "--size", "16x48")
    assert code == 1
    assert "7 of 40 inputs are broken already, more than --max-broken 0.05 allows" in stderr
    assert len(stderr.splitlines()) == 1
    assert len((tmp_path / "set" / "broken.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "16"], "--size 16: give HEIGHTxWIDTH"),
        (["--size", "16x48,8x8"], "a set has one size"),
        (["--size", "16x48", "--device", "tpu7"], "--device tpu7 cannot be used here"),
    ],
)
def test_mistakes_are_one_line_and_status_2(options: list[str], message: str, source: Path, tmp_path: Path) -> None:
    code, _, stderr = prepare(source, tmp_path / "set", *options)
    assert (code, message in stderr) == (2, True), stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "set").exists()


def test_sources_and_sets_that_are_none(source: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    for where, out, message in (
        (tmp_path / "none", tmp_path / "set", "none does not exist"),
        (bare, tmp_path / "set", "is no source of pictures"),
        (source, source, "is not empty and holds no prepared set"),
    ):
        code, _, stderr = prepare(where, out, "--size", "16x48")
        assert (code, message in stderr) == (2, True), stderr
    (bare / "metadata.jsonl").write_text("\n")
    code, _, stderr = prepare(bare, tmp_path / "set", "--size", "16x48")
    assert (code, "holds no pictures" in stderr) == (2, True), stderr
    code, _, stderr = ddrl("data", "inspect", str(source))
    assert (code, "is no prepared set" in stderr) == (2, True), stderr


def test_a_latent_that_is_not_finite_is_broken_and_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = begun(Preparation(source, tmp_path / "set", BASE, 16, 48, shard_rows=16))
    writer = ShardWriter(work.preparation, "cpu")
    pixels, rows, broken = read_slice(work.reader, work.slices[0], 16, 48)
    latents = writer.codec.encode(pixels)
    latents[2, 0, 0, 0] = float("nan")
    monkeypatch.setattr(writer.codec, "encode", lambda _: latents)
    assert writer.write(0, pixels, rows, broken) == len(broken) + 1
    shard = read_header(shard_file(tmp_path / "set", 0))[1]
    assert (shard.broken[-1].name, "not finite" in shard.broken[-1].reason) == (rows[2].name, True)
    assert shard.rows == rows[:2] + rows[3:]


def test_the_policy_may_be_a_hub_id_and_must_be_one_at_all(source: Path, tmp_path: Path, cached_policy: tuple[str, Path]) -> None:
    name, snapshot = cached_policy
    write_shards(source, tmp_path / "set")
    code, _, stderr = prepare(source, tmp_path / "set", "--size", "16x48", "--max-broken", "0.2", "--model", name)
    assert (code, stderr) == (0, "")
    assert read_manifest(tmp_path / "set").model == str(snapshot)
    for model, words in ((str(tmp_path / "gone"), "checkpoint folder"), (str(tmp_path), "is no policy folder")):
        code, _, stderr = prepare(source, tmp_path / "other", "--size", "16x48", "--model", model)
        assert code == 2
        assert words in stderr
    assert not (tmp_path / "other").exists()


CLIPS = ("--size", "32x48", "--frames", str(FRAMES), "--fps", "16", "--max-broken", "0.5")


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("policy") / "wan"
    write_tiny(folder)
    return folder


def test_a_set_of_clips(video: Path, tmp_path: Path) -> None:
    source = mixed_clips.write_folder(tmp_path / "source", 16)
    work = begun(Preparation(source, tmp_path / "set", video, 32, 48, shard_rows=6, max_broken=0.5, frames=FRAMES, fps=16.0))
    writer = ClipWriter(work.preparation, work.reader, "cpu")
    assert sum(writer.write(number, work.slices[number]) for number in reversed(work.missing)) == len(mixed_clips.BROKEN)
    code, stdout, stderr = ddrl("prepare-data", str(source), str(tmp_path / "set"), "--model", str(video), "--shard-rows", "6", *CLIPS)
    assert (code, stderr) == (0, "")
    assert "8 examples" in stdout
    manifest = read_manifest(tmp_path / "set")
    assert (manifest.latent, manifest.frames, manifest.fps, manifest.shards) == ((16, 3, 4, 6), FRAMES, 16.0, 3)
    broken = {line["name"]: line["reason"] for line in map(json.loads, (tmp_path / "set" / "broken.jsonl").read_text().splitlines())}
    assert broken.keys() == mixed_clips.BROKEN.keys()
    assert all(said in broken[name] for name, said in mixed_clips.BROKEN.items()), broken
    codec, examples = load_codec(video), PreparedSource(str(tmp_path / "set"))
    for i, example in enumerate(examples):
        name = f"{i:04d}.{mixed_clips.KINDS[i % 4][0]}"
        clip, _ = decode_clip((source / name).read_bytes(), 32, 48, FRAMES, 16.0)
        assert example.text == f"clip {i} at {mixed_clips.RATES[i // 2]}"
        assert example.first is not None
        assert example.latent is not None
        np.testing.assert_array_equal(example.first.load(), clip[0])
        torch.testing.assert_close(torch.from_numpy(example.latent.load()), codec.encode(clip[None])[0], atol=1e-5, rtol=0)
    code, stdout, stderr = ddrl("data", "inspect", str(tmp_path / "set"), "--out", str(tmp_path / "grid.png"))
    assert (code, stderr) == (0, "")
    assert f"clips of {FRAMES} frames at 16 a second of 32x48 pixels, latents of 16x3x4x6, 3 shards" in stdout
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 2 * 4 * 48


def test_frames_are_for_clips_and_clips_need_them(source: Path, video: Path, tmp_path: Path) -> None:
    for model, options, message in (
        (video, ("--size", "32x48"), "is a policy of clips: say how many frames a second, and how many in all, as the run's sampler does (--frames, --fps)"),
        (BASE, CLIPS, "is a policy of pictures, which have no frames (--frames, --fps)"),
        (video, ("--size", "32x48", "--fps", "16"), "--fps is of clips: say with --frames how many are taken"),
        (video, ("--size", "32x48", "--frames", "10"), "10 frames are not 4 k + 1"),
    ):
        code, _, stderr = ddrl("prepare-data", str(source), str(tmp_path / "set"), "--model", str(model), *options)
        assert (code, message in stderr) == (2, True), stderr
    assert not (tmp_path / "set").exists()


def test_of_a_clip_there_is_one_in_memory(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is decoded is encoded and let go before the next one is decoded."""
    source = mixed_clips.write_folder(tmp_path / "source", 16)
    work = begun(Preparation(source, tmp_path / "set", video, 32, 48, max_broken=0.5, frames=FRAMES, fps=16.0))
    alive, most = list[weakref.ref[Any]](), list[int]()

    def decoded(*arguments: Any) -> Any:
        most.append(sum(one() is not None for one in alive))
        clip, size = decode_clip(*arguments)
        alive.append(weakref.ref(clip))
        return clip, size

    monkeypatch.setattr(pipeline, "decode_clip", decoded)
    ClipWriter(work.preparation, work.reader, "cpu").write(0, work.slices[0])
    assert most == [0] * 14  # all but the one without a caption and the one that is missing
