"""Prepared sets on disk, and as a source: whole or not there, the same to the digest, read by shard."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.config import DataConfig, PromptConfig
from actors.prepared import Broken, Manifest, PreparedError, Row, begin, finish, read_header, read_manifest, shard_file, shard_rows, write_shard
from actors.preparing.inspection import grid, inspection
from actors.sources.draws import data_source, held_out_rows, listed, prompt_source, training_example, training_rows
from actors.sources.example import SourceError, split_of
from actors.sources.latents import clean_latents
from actors.sources.prepared import PreparedSource
from diffusion.codecs import IdentityCodec

ROOT = Path(__file__).parents[3]
SHAPE = (3, 4, 6)
PLAN = {"source": "s", "shard_rows": 20}


def latents(shard: int, n: int) -> np.ndarray:
    return np.random.default_rng(shard).uniform(-1, 1, (n, *SHAPE)).astype(np.float32)


def write(folder: Path, shards: tuple[int, ...] = (0, 1, 2), codec: str = "pixels", captions: str = "caption") -> None:
    begin(folder, PLAN)
    for shard in shards:
        rows = [Row(f"{captions} {shard}-{i}", f"{captions} {shard}-{i}", f"{shard}/{i}.png", 30, 20 + i % 2) for i in range(20)]
        write_shard(folder, shard, latents(shard, 20), rows, [Broken("b.png", "the file is empty")] * (shard == 1))


def make(folder: Path, model: str = "recipes/glyph-base", codec: str = "pixels") -> Manifest:
    write(folder)
    return finish(folder, 3, [], codec=codec, model=model, height=4, width=6, latent=SHAPE)


def test_a_set_is_the_same_to_the_digest_however_it_came_about(tmp_path: Path) -> None:
    straight = make(tmp_path / "a")
    write(tmp_path / "b", (2,))
    write(tmp_path / "b", (1, 0))  # begun again
    assert finish(tmp_path / "b", 3, [], codec="pixels", model="elsewhere", height=4, width=6, latent=SHAPE).digest == straight.digest
    assert (straight.rows, straight.broken, straight.splits) == (
        60,
        1,
        {s: sum(split_of(f"caption {a}-{b}") == s for a in range(3) for b in range(20)) for s in ("train", "dev", "test")},
    )
    assert shard_file(tmp_path / "a", 1).read_bytes() == shard_file(tmp_path / "b", 1).read_bytes()
    assert json.loads((tmp_path / "a" / "broken.jsonl").read_text()) == {"name": "b.png", "reason": "the file is empty"}
    assert make(tmp_path / "a") == straight  # finished twice
    assert straight.digest == "96a34105f0f6aa9941d0f87f6d192d49"  # as builds made it that knew no clips
    assert not {"frames", "fps"} & json.loads((tmp_path / "a" / "prepared.json").read_text()).keys()


def test_anything_else_has_another_digest(tmp_path: Path) -> None:
    digests = {make(tmp_path / "a").digest}
    write(tmp_path / "b", captions="other")
    digests.add(finish(tmp_path / "b", 3, [], codec="pixels", model="", height=4, width=6, latent=SHAPE).digest)
    write(tmp_path / "c")
    write_shard(tmp_path / "c", 2, latents(9, 20), read_header(shard_file(tmp_path / "c", 2))[1].rows, [])
    digests.add(finish(tmp_path / "c", 3, [], codec="pixels", model="", height=4, width=6, latent=SHAPE).digest)
    write(tmp_path / "d")
    digests.add(finish(tmp_path / "d", 3, [Broken("t.tar", "cut")], codec="pixels", model="", height=4, width=6, latent=SHAPE).digest)
    assert len(digests) == 4


def test_an_unfinished_set_is_none(tmp_path: Path) -> None:
    write(tmp_path / "set", (0, 2))
    with pytest.raises(PreparedError, match="is unfinished; run the command that makes it once more"):
        PreparedSource(str(tmp_path / "set"))
    with pytest.raises(PreparedError, match="is no prepared set"):
        read_manifest(tmp_path)
    with pytest.raises(PreparedError, match=r"00001\.safetensors cannot be read"):
        finish(tmp_path / "set", 3, [], codec="pixels", model="", height=4, width=6, latent=SHAPE)


def test_what_was_begun_otherwise_is_left_alone(tmp_path: Path) -> None:
    make(tmp_path / "set")
    with pytest.raises(PreparedError, match="begun otherwise: shard_rows is 20 there and 10 now"):
        begin(tmp_path / "set", PLAN | {"shard_rows": 10})
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(PreparedError, match="is not empty and holds no prepared set"):
        begin(tmp_path / "notes", PLAN)
    assert [f.name for f in (tmp_path / "notes").iterdir()] == ["a.txt"]


def test_a_shard_of_broken_inputs_alone(tmp_path: Path) -> None:
    begin(tmp_path / "set", PLAN)
    write_shard(tmp_path / "set", 0, np.empty((0, *SHAPE), np.float32), [], [Broken("a", "b")])
    manifest = finish(tmp_path / "set", 1, [], codec="pixels", model="", height=4, width=6, latent=SHAPE)
    assert (manifest.rows, manifest.broken) == (0, 1)
    with pytest.raises(PreparedError, match="holds no examples"):
        PreparedSource(str(tmp_path / "set"))
    with pytest.raises(ValueError, match="one fp32 latent for each of its 1 rows"):
        write_shard(tmp_path / "set", 0, np.empty((0, *SHAPE), np.float32), [Row("a", "a", "a", 1, 1)], [])


def test_a_set_is_a_source_of_prompts_and_latents(tmp_path: Path) -> None:
    make(tmp_path / "set")
    config = DataConfig(kind="prepared", path=str(tmp_path / "set"))
    source = data_source(config)
    rows = training_rows(source, 0.5, 3, 0, 40)
    assert {split_of(example.id) for _, example in rows} == {"train"}
    assert 5 < sum(caption == "" for caption, _ in rows) < 35
    x0 = clean_latents([example for _, example in rows], IdentityCodec(), 4, 6)
    assert (x0.shape, x0.dtype) == ((40, *SHAPE), torch.float32)
    for (_, example), latent in zip(rows, x0, strict=True):
        shard, row = map(int, example.text.removeprefix("caption ").split("-"))
        np.testing.assert_array_equal(latent.numpy(), latents(shard, 20)[row])
    assert [example for _, example in training_rows(source, 0.5, 3, 0, 40)] == [example for _, example in rows]
    assert {example.split for _, example in held_out_rows(source, "dev", 5)} == {"dev"}
    assert training_example(prompt_source(PromptConfig(), config), 0, 0).text.startswith("caption ")
    everything = listed(source)
    assert everything is not None
    assert [example.text for example in everything[:2]] == ["caption 0-0", "caption 0-1"]
    assert len(everything) == 60
    with pytest.raises(SourceError, match="holds latents and no pictures"):
        rows[0][1].pixels(4, 6)
    with pytest.raises(ValueError, match=r"data.kind=prepared needs data.path"):
        DataConfig(kind="prepared")


def make_clips(folder: Path, **about: Any) -> Manifest:
    begin(folder, {})
    draw = np.random.default_rng(1)
    rows = [Row(f"clip {i}", f"clip {i}", f"{i}.mp4", 8, 6) for i in range(20)]
    clips, first = draw.uniform(-1, 1, (20, 3, 5, 4, 6)).astype(np.float32), draw.integers(0, 256, (20, 4, 6, 3), np.uint8)
    write_shard(folder, 0, clips, rows, [], first)
    size = {"height": 4, "width": 6, "latent": (3, 5, 4, 6), "frames": 5, "fps": 16.0}
    return finish(folder, 1, [], **{"codec": "pixels", "model": str(ROOT / "recipes" / "glyph-base"), **size, **about})


def test_a_set_of_clips_keeps_their_first_frames(tmp_path: Path) -> None:
    manifest = make_clips(tmp_path / "set")
    assert (read_manifest(tmp_path / "set"), manifest.kind) == (manifest, "clips of 5 frames at 16 a second")
    source, draw = PreparedSource(str(tmp_path / "set")), np.random.default_rng(1)
    clips, first = draw.uniform(-1, 1, (20, 3, 5, 4, 6)).astype(np.float32), draw.integers(0, 256, (20, 4, 6, 3), np.uint8)
    np.testing.assert_array_equal(clean_latents(source[:20], IdentityCodec(video=True), 4, 6, 5).numpy(), clips)
    for i, example in enumerate(source):
        assert example.first is not None
        np.testing.assert_array_equal(example.first.load(), first[i])
    assert make_clips(tmp_path / "slow", fps=8.0).digest != manifest.digest
    assert make(tmp_path / "pictures").kind == "pictures"
    assert PreparedSource(str(tmp_path / "pictures"))[0].first is None
    for frames in (None, first[:19], first.astype(np.float32)):
        with pytest.raises(ValueError, match="one uint8 first frame for each of its 20 clips"):
            write_shard(tmp_path / "set", 0, clips, [Row(str(i), "", "", 1, 1) for i in range(20)], [], frames)  # type: ignore[arg-type]
    file = shard_file(tmp_path / "set", 0)
    data = bytearray(file.read_bytes())
    where = bytes(data).index(first[7].tobytes())
    data[where] ^= 1
    file.write_bytes(data)
    with pytest.raises(PreparedError, match=r"00000\.safetensors is damaged"):
        list(inspection(tmp_path / "set"))


def test_a_shard_of_clips_is_bounded_in_bytes() -> None:
    assert shard_rows(64, (16, 64, 64), 512, 512) == 64
    assert shard_rows(64, (16, 3, 4, 4), 32, 32) == 64
    assert shard_rows(64, (16, 24, 88, 160), 704, 1280) == 5  # 93 frames: 21.6 MB, and 2.7 of the first
    assert shard_rows(64, (16, 240, 88, 160), 704, 1280) == 1


def test_inspection_says_what_is_there_and_finds_damage(tmp_path: Path) -> None:
    make(tmp_path / "set", str(ROOT / "recipes" / "glyph-base"))
    lines = "\n".join(inspection(tmp_path / "set"))
    for words in (
        "60 examples: ",
        "latents of 3x4x6, 3 shards",
        "2 sizes, most often 20x30 (30), 21x30 (30); 0 smaller",
        "60 distinct, characters 11 / 12",
        "b.png: the file is empty",
        "are right",
    ):
        assert words in lines, words
    assert grid(tmp_path / "set", 8).size[0] > 8 * 6
    with pytest.raises(PreparedError, match="no longer at"):
        grid(tmp_path / "set", 8, tmp_path / "none")
    file = shard_file(tmp_path / "set", 2)
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(PreparedError, match=r"00002\.safetensors is damaged"):
        list(inspection(tmp_path / "set"))
    file.write_bytes(data[:40])
    with pytest.raises(PreparedError, match=r"00002\.safetensors cannot be read"):
        list(inspection(tmp_path / "set"))


def test_ray_data_is_imported_where_data_is_prepared_and_nowhere_else() -> None:
    users = [
        str(f.relative_to(ROOT))
        for room in ("diffusion", "replay", "services", "actors", "trainer")
        for f in (ROOT / room).rglob("*.py")
        if "import ray.data" in f.read_text() or "from ray.data" in f.read_text()
    ]
    assert users == ["actors/preparing/pipeline.py"]
    code = "import sys, trainer.cli.data, actors.preparing.pipeline, actors.anchor; print([m for m in ('ray.data', 'pyarrow', 'pandas') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, text=True, capture_output=True, timeout=120, check=True)
    assert done.stdout == "[]\n"
