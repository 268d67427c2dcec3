"""Preparing data through Ray Data: all forms alike, what is there is not made again, a VAE's latents, too much broken."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from pyarrow import parquet

from actors.preparing.pipeline import Preparation, PreparationFailed, TooManyBroken, begun, prepare
from actors.sources.example import SourceError
from actors.sources.prepared import PreparedSource
from diffusion.checkpoint import load_codec
from diffusion.families.wan.tiny import write_tiny
from tests import mixed_clips
from tests.mixed_pictures import BROKEN, write_folder

BASE = Path(__file__).parents[3] / "recipes" / "glyph-base"
pytestmark = pytest.mark.usefixtures("ray_cluster")


def write_vae(folder: Path) -> Path:
    """A policy folder as far as its codec goes: an untrained autoencoder of factor 2."""
    torch.manual_seed(0)
    blocks = {"block_out_channels": (8, 16), "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=4, scaling_factor=1.5, shift_factor=0.1).save_pretrained(folder / "vae")
    return folder


def test_latents_are_the_codecs_of_cropped_pictures(tmp_path: Path) -> None:
    source = write_folder(tmp_path / "source", 40)
    manifest = prepare(begun(Preparation(source, tmp_path / "set", write_vae(tmp_path / "policy"), 16, 24, shard_rows=8, max_broken=0.2)), workers=2)
    assert (manifest.rows, manifest.broken, manifest.shards, manifest.latent) == (33, 7, 5, (4, 8, 12))
    broken = {line["name"]: line["reason"] for line in map(json.loads, (tmp_path / "set" / "broken.jsonl").read_text().splitlines())}
    assert broken.keys() == BROKEN.keys()
    assert all(said in broken[name] for name, said in BROKEN.items()), broken
    codec = load_codec(tmp_path / "policy")
    examples = PreparedSource(str(tmp_path / "set"))
    assert [example.text for example in examples] == [f"gradient {i}" + example.text[len(f"gradient {i}") :] for i, example in enumerate(examples)]
    with Image.open(source / "1" / "0007.jpg") as image:  # wider than the set: cropped left and right
        cut = (image.width - image.height * 24 / 16) / 2
        box = (
            (cut, 0, image.width - cut, image.height)
            if cut > 0
            else (0, (image.height - image.width * 16 / 24) / 2, image.width, (image.height + image.width * 16 / 24) / 2)
        )
        pixels = np.array(image.resize((24, 16), Image.Resampling.BICUBIC, box))
    latent = examples[7].latent
    assert latent is not None
    torch.testing.assert_close(torch.from_numpy(latent.load()), codec.encode(pixels[None])[0], atol=1e-4, rtol=0)


@pytest.mark.long
def test_the_same_pictures_in_every_form_give_the_same_latents(tmp_path: Path) -> None:
    source = tmp_path / "folder"
    write_folder(source, 27)
    lines = [line for line in map(json.loads, (source / "metadata.jsonl").read_text().splitlines()) if line["file_name"] not in BROKEN]
    (source / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    pictures = [((source / line["file_name"]).read_bytes(), line["text"]) for line in lines]
    tars, tables, saved = (tmp_path / name for name in ("tars", "tables", "saved"))
    for folder in (tars, tables, saved):
        folder.mkdir()
    for half in (0, 1):
        with tarfile.open(tars / f"{half}.tar", "w") as tar:
            for number, (data, text) in list(enumerate(pictures))[half * 10 : 10 + half * 10]:
                for suffix, content in (("txt", text.encode()), (lines[number]["file_name"].rpartition(".")[2], data)):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    table = pa.table({"image": [{"bytes": data, "path": None} for data, _ in pictures], "text": [text for _, text in pictures]})
    parquet.write_table(table, tables / "a.parquet", row_group_size=10)
    with pa.ipc.new_stream(str(saved / "data-00000-of-00001.arrow"), table.schema) as stream:
        stream.write_table(table, max_chunksize=10)
    (saved / "state.json").write_text('{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    made = {}
    for form in (source, tars, tables, saved):
        out = tmp_path / f"{form.name}-set"
        prepare(begun(Preparation(form, out, BASE, 16, 48, shard_rows=10)))
        made[form.name] = [(e.id, e.text, e.latent.load().tobytes()) for e in PreparedSource(str(out)) if e.latent]
    assert [text for _, text, _ in made["folder"]] == [text for _, text in pictures]
    assert all(found == made["folder"] for found in made.values())


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    job = Preparation(write_folder(tmp_path / "source", 60), tmp_path / "set", BASE, 16, 48, shard_rows=8, max_broken=0.2)
    first = prepare(begun(job))
    shards = sorted((tmp_path / "set" / "shards").iterdir())
    kept = shards[3].stat().st_mtime_ns
    (tmp_path / "set" / "prepared.json").unlink()
    shards[1].unlink()
    told: list[tuple[int, int]] = []
    assert prepare(begun(job), progress=lambda done, total: told.append((done, total))) == first
    assert told == [(8, 8)]
    assert shards[3].stat().st_mtime_ns == kept
    with pytest.raises(SourceError, match="begun otherwise: height is 16 there and 32 now"):
        begun(replace(job, height=32))


def test_too_much_broken_is_an_error_that_can_be_allowed(tmp_path: Path) -> None:
    job = Preparation(write_folder(tmp_path / "source", 60), tmp_path / "set", BASE, 16, 48, shard_rows=8)
    with pytest.raises(TooManyBroken, match=r"of 60 inputs are broken already, more than --max-broken 0\.05 allows \(.*; all are in .*broken\.jsonl"):
        prepare(begun(job))
    assert (tmp_path / "set" / "broken.jsonl").exists()
    assert not (tmp_path / "set" / "prepared.json").exists()
    assert prepare(begun(replace(job, max_broken=0.2))).broken == 7
    work = begun(replace(job, out=tmp_path / "lost"))
    (job.source / "metadata.jsonl").unlink()
    with pytest.raises(PreparationFailed, match=r"a worker failed: metadata\.jsonl: FileNotFoundError: .*No such file"):
        prepare(work)
    with pytest.raises(SourceError, match="not a multiple of 2"):
        begun(Preparation(write_folder(tmp_path / "again", 10), tmp_path / "other", write_vae(tmp_path / "policy"), 15, 24))


def test_clips_of_a_folder_and_of_a_tar_give_the_same_latents(tmp_path: Path) -> None:
    write_tiny(tmp_path / "wan")
    source = mixed_clips.write_folder(tmp_path / "folder", 16)
    lines = [json.loads(line) for line in (source / "metadata.jsonl").read_text().splitlines()]
    with tarfile.open(tmp_path / "clips.tar", "w") as tar:
        for number, line in enumerate(lines):
            if line["file_name"] not in mixed_clips.BROKEN:
                for suffix, content in (("txt", line["text"].encode()), (line["file_name"].rpartition(".")[2], (source / line["file_name"]).read_bytes())):
                    member = tarfile.TarInfo(f"{number:04d}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    made = []
    for form in (source, tmp_path / "clips.tar"):
        out = tmp_path / f"{form.name}-set"
        job = Preparation(form, out, tmp_path / "wan", 32, 48, shard_rows=5, max_broken=0.5, frames=mixed_clips.FRAMES, fps=mixed_clips.FPS)
        manifest = prepare(begun(job), workers=2)
        assert (manifest.rows, manifest.latent, manifest.frames) == (8, (16, 3, 4, 6), mixed_clips.FRAMES)
        made.append([(e.text, e.latent.load().tobytes(), e.first.load().tobytes()) for e in PreparedSource(str(out)) if e.latent and e.first])
    assert made[0] == made[1]
    assert len(made[0]) == 8
    work = begun(Preparation(source, tmp_path / "lost", tmp_path / "wan", 32, 48, frames=9, fps=16.0))
    (source / "metadata.jsonl").unlink()
    with pytest.raises(PreparationFailed, match=r"a worker failed: metadata\.jsonl: FileNotFoundError: .*No such file"):
        prepare(work)
