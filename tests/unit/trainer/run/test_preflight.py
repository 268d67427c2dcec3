"""Mistakes that files show, found before anything starts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from actors.prepared import Row, begin, finish, shard_file, write_shard
from diffusion.digests import codec_digest
from diffusion.families.wan import tiny as wan
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.run.preflight import check_files, check_policy

BASE = Path(__file__).resolve().parents[4] / "recipes" / "glyph-base"


def refused(tree: dict[str, Any]) -> str:
    config = parse_config({"model": {"path": str(BASE)}} | tree)
    with pytest.raises(ConfigError) as error:
        check_files(config)
    return str(error.value)


def folder(path: Path, captions: list[str]) -> Path:
    """An anchor folder of grey pictures."""
    path.mkdir()
    lines = [{"file_name": f"{i}.png", "text": caption} for i, caption in enumerate(captions)]
    (path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        Image.fromarray(np.full((16, 48, 3), 128, np.uint8)).save(path / line["file_name"])
    return path


def test_the_demo_passes() -> None:
    config = parse_config({"model": {"path": str(BASE)}})
    check_files(config)
    check_policy(config)


def test_a_model_folder_that_is_none(tmp_path: Path) -> None:
    assert "recipes/none does not exist" in refused({"model": {"path": "recipes/none"}})
    assert "transformer/config.json is missing" in refused({"model": {"path": str(tmp_path)}})
    copy = shutil.copytree(BASE, tmp_path / "copy")
    for file in (copy / "transformer").glob("*.safetensors"):
        file.unlink()
    assert "holds no weights; set model.init=true" in refused({"model": {"path": str(copy)}})
    check_files(parse_config({"model": {"path": str(copy), "init": True}}))


@pytest.mark.parametrize(
    ("size", "words"), [({"height": 160}, "40x12 patches exceed pos_embed_max_size=24"), ({"width": 47}, "16x47 pixels are no multiple of 4")]
)
def test_a_size_that_the_policy_cannot_sample(size: dict[str, int], words: str) -> None:
    assert words in refused({"sampler": size})
    with pytest.raises(ConfigError, match=r"^model: "):  # the network itself agrees
        check_policy(parse_config({"model": {"path": str(BASE)}, "sampler": size}))


@pytest.mark.parametrize("key", ["data_weighting", "data_times"])
def test_what_is_stated_for_a_flow_of_a_policy_that_is_none(key: str, tmp_path: Path) -> None:
    copy = shutil.copytree(BASE, tmp_path / "copy")
    (copy / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "DDIMScheduler"}))
    tree = {"model": {"path": str(copy)}, "sampler": {"kernel": "ddim_eta"}}
    with pytest.raises(ConfigError, match=rf"objective\.{key}=cosmos is stated for a network that predicts a flow's velocity.*variance_preserving"):
        check_policy(parse_config(tree | {"objective": {key: "cosmos"}}))
    check_policy(parse_config(tree | {"objective": {key: "cosmos", "data_weight": 0}}))  # there is no data term
    check_policy(parse_config({"model": {"path": str(BASE)}, "objective": {key: "cosmos"}}))


def test_sequence_ranks_that_cannot_share_the_heads() -> None:
    check_policy(parse_config({"model": {"path": str(BASE)}, "learner": {"ranks": 6, "sequence_ranks": 3}}))
    config = parse_config({"model": {"path": str(BASE)}, "learner": {"ranks": 6, "sequence_ranks": 2}})
    with pytest.raises(ConfigError, match=r"learner\.sequence_ranks: 3 attention heads cannot be shared evenly by 2 sequence ranks; possible are 1, 3"):
        check_policy(config)


def test_a_prompt_file_that_is_missing_or_too_short(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    tree = {"prompts": {"kind": "file", "path": str(file)}}
    assert f"prompt file {file} cannot be read: No such file" in refused(tree)
    file.write_text("".join(f'a sign that says "{i}"\n' for i in range(40)))
    assert "distinct test prompts, 512 were asked for" in refused(tree)


def test_more_held_out_prompts_than_a_drawn_world_has() -> None:
    """4,400 numbers in motion, a tenth of them held out for the test."""
    told = refused({"data": {"kind": "glyph_video"}, "evaluation": {"test_prompts": 500}})
    assert "prompts: the prompt source has only" in told
    assert "distinct test prompts, 500 were asked for; lower evaluation.*_prompts" in told


def test_an_anchor_folder_that_lacks_something(tmp_path: Path) -> None:
    tree = {"data": {"kind": "folder", "path": str(tmp_path / "none")}}
    assert "needs a metadata.jsonl" in refused(tree)
    one = folder(tmp_path / "one", ["a"])
    assert "no example of the" in refused({"data": {"kind": "folder", "path": str(one)}, "prompts": {"kind": "glyph"}})
    many = folder(tmp_path / "many", [f"caption {i}" for i in range(80)])
    tree = {"data": {"kind": "folder", "path": str(many)}, "prompts": {"kind": "glyph"}}
    check_files(parse_config({"model": {"path": str(BASE)}} | tree))
    with (many / "metadata.jsonl").open("a") as file:
        file.write('{"file_name": "lost.png", "text": "caption 3"}\n')
    assert "1 of 81 pictures" in refused(tree) or "lost.png cannot be read" in refused(tree)


def test_texts_that_the_encoder_cannot_tell_apart_are_refused(tmp_path: Path) -> None:
    """The committed base hashes words into few bins: "sign" and "large" are one to it."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "1"\na large that says "1"\n')
    config = parse_config({"model": {"path": str(BASE)}, "prompts": {"kind": "file", "path": str(prompts)}})
    with pytest.raises(ConfigError, match="are the same to the text encoder"):
        check_policy(config)


def test_a_text_that_the_encoder_cannot_take_is_refused(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('a sign that says "123456789"\n')
    config = parse_config({"model": {"path": str(BASE)}, "prompts": {"kind": "file", "path": str(prompts)}})
    with pytest.raises(ConfigError, match=r"prompts: prompt .*123456789"):
        check_policy(config)


def test_scenes_need_an_encoder_that_holds_a_sentence() -> None:
    config = parse_config({"model": {"path": str(BASE)}, "prompts": {"kind": "ocr_scenes"}})
    check_files(config)
    with pytest.raises(ConfigError, match=r"prompts: prompt .* this text encoder holds 10 tokens"):
        check_policy(config)


def prepared(path: Path, codec: str = "pixels", size: tuple[int, int] = (16, 48), captions: int = 80) -> Path:
    """A set of grey latents, made by a policy in pixel space."""
    begin(path, {})
    rows = [Row(f"caption {i}", f"caption {i}", f"{i}.png", 9, 9) for i in range(captions)]
    write_shard(path, 0, np.zeros((captions, 3, *size), np.float32), rows, [])
    finish(path, 1, [], codec=codec, model="made/by", height=size[0], width=size[1], latent=(3, *size))
    return path


def test_a_prepared_set_must_be_of_the_runs_codec_and_size(tmp_path: Path) -> None:
    def tree(path: Path) -> dict[str, Any]:
        return {"data": {"kind": "prepared", "path": str(path)}, "prompts": {"kind": "glyph"}}

    fits = prepared(tmp_path / "fits")
    check_files(parse_config({"model": {"path": str(BASE)}} | tree(fits)))
    assert f"data: the latents of {tmp_path / 'other'} were made by another codec (0a0b, of made/by) than the one of {BASE} (pixels)" in refused(
        tree(prepared(tmp_path / "other", codec="0a0b"))
    )
    assert "was prepared at 32x96 pixels and the run samples 16x48" in refused(tree(prepared(tmp_path / "large", size=(32, 96))))
    assert "is no prepared set" in refused(tree(tmp_path / "none"))
    assert "no example of the" in refused(tree(prepared(tmp_path / "one", captions=1)))
    (fits / "prepared.json").rename(tmp_path / "kept.json")
    assert "is unfinished" in refused(tree(fits))
    (tmp_path / "kept.json").rename(fits / "prepared.json")
    shard_file(fits, 0).unlink()
    assert "1 of 1 shards of" in refused(tree(fits))


def test_captions_of_a_prepared_set_are_prompts_the_encoder_must_take(tmp_path: Path) -> None:
    tree = {"data": {"kind": "prepared", "path": str(prepared(tmp_path / "set"))}, "evaluation": {"test_prompts": 3, "dev_prompts": 3}}
    config = parse_config({"model": {"path": str(BASE)}} | tree)
    check_files(config)
    with pytest.raises(ConfigError, match="are the same to the text encoder"):  # 80 captions of two words in 64 bins
        check_policy(config)


def test_a_prepared_set_of_clips_must_be_of_the_runs_frames(tmp_path: Path) -> None:
    wan.write_tiny(tmp_path / "wan")
    codec = codec_digest(tmp_path / "wan")
    begin(tmp_path / "set", {})
    rows = [Row(f"caption {i}", f"caption {i}", f"{i}.mp4", 9, 9) for i in range(80)]
    write_shard(tmp_path / "set", 0, np.zeros((80, 16, 3, 4, 4), np.float32), rows, [], np.zeros((80, 32, 32, 3), np.uint8))
    finish(tmp_path / "set", 1, [], codec=codec, model="made/by", height=32, width=32, latent=(16, 3, 4, 4), frames=9, fps=16.0)

    def tree(**sampler: Any) -> dict[str, Any]:
        size = {"height": 32, "width": 32, "frames": 9, "fps": 16.0} | sampler
        return {
            "model": {"path": str(tmp_path / "wan")},
            "sampler": size,
            "data": {"kind": "prepared", "path": str(tmp_path / "set")},
            "prompts": {"kind": "glyph"},
        }

    check_files(parse_config(tree()))
    for changed, said in (({"frames": 5}, "5 frames at 16 a second"), ({"fps": 24.0}, "9 frames at 24 a second")):
        assert f"was prepared as clips of 9 frames at 16 a second and the run samples clips of {said}; set sampler.frames" in refused(tree(**changed))
    pixels = prepared(tmp_path / "pictures", codec=codec, size=(32, 32))
    assert "was prepared as pictures and the run samples clips of 9 frames" in refused(tree() | {"data": {"kind": "prepared", "path": str(pixels)}})
