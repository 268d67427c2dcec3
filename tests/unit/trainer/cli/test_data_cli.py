"""`ddrl prepare-data` and `ddrl data inspect`: how they say no, and a set that needs no more work."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from actors.prepared import read_header, read_manifest, shard_file
from actors.preparing.pipeline import Preparation, ShardWriter, begun, read_slice
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
