"""`ddrl presample`: exactly N of each prompt, the same set whenever it was stopped, and anchor data that a run takes."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from actors import prepared
from actors.conditioning import first_frames
from actors.prepared import read_header, read_manifest, shard_file
from actors.preparing.presampling import chosen
from actors.sources.example import SourceError, split_of
from actors.sources.folder import FolderSource
from actors.sources.glyph import GlyphSource
from actors.sources.prepared import PreparedSource
from actors.sources.text import TextSource
from diffusion.checkpoint import load_codec, load_policy
from diffusion.config import ModelConfig
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest
from diffusion.families.wan.tiny import write_tiny
from diffusion.seeds import key
from trainer.cli.main import app
from trainer.config.load import parse_config
from trainer.run.preflight import check_files

ROOT = Path(__file__).parents[4]
BASE = str(ROOT / "recipes" / "glyph-base")


def presample(out: Path, *arguments: str, prompts: str = "10", per_prompt: str = "4") -> tuple[int, str, str]:
    line = ["presample", str(ROOT / "recipes" / "glyph-ocr.yaml"), "--out", str(out), "--set", f"model.path={BASE}", "--steps", "2", "--shard-rows", "12"]
    done = CliRunner().invoke(app, [*line, "--prompts", prompts, "--per-prompt", per_prompt, *arguments])
    return done.exit_code, done.stdout, done.stderr


def manifest(out: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((out / "prepared.json").read_text())
    return found


def test_exactly_n_of_each_prompt_and_what_the_policy_draws(tmp_path: Path) -> None:
    code, stdout, stderr = presample(tmp_path / "set")
    assert (code, stderr) == (0, "")
    assert "40 examples" in stdout
    examples = PreparedSource(str(tmp_path / "set"))
    assert set(Counter(example.text for example in examples).values()) == {4}
    assert len({example.text for example in examples}) == 10
    assert all(example.id == example.text for example in examples)  # so that samples of a prompt stand in one split
    assert len(list((tmp_path / "set" / "shards").iterdir())) == 4
    latents = [example.latent.load() for example in examples if example.latent]
    assert len({latent.tobytes() for latent in latents}) == 40
    policy = load_policy(ModelConfig(path=BASE))
    request = SampleRequest((3, 16, 48), 2, prompt=examples[16].text, n=4, seed=key(0, "presample"), group=4, kernel="ddim_eta")
    alone = Engine(policy.transformer, policy.process, 16384, "float32", policy.text_encoder).run([request])
    torch.testing.assert_close(torch.from_numpy(np.stack(latents[16:20])), torch.stack([t.latent for t in alone]), atol=1e-5, rtol=0)


def test_stopped_anywhere_it_makes_the_same_set(tmp_path: Path) -> None:
    assert presample(tmp_path / "set")[0] == 0
    shutil.copytree(tmp_path / "set", tmp_path / "stopped")
    for name in ("prepared.json", "index.parquet", "broken.jsonl"):
        (tmp_path / "stopped" / name).unlink()
    kept = shard_file(tmp_path / "stopped", 0).stat().st_mtime_ns
    for number in (1, 3):
        shard_file(tmp_path / "stopped", number).unlink()
    (tmp_path / "stopped" / "shards" / "00001.safetensors.77.partial").write_bytes(b"half a shard")
    assert presample(tmp_path / "stopped")[0] == 0
    assert manifest(tmp_path / "stopped") == manifest(tmp_path / "set")
    assert shard_file(tmp_path / "stopped", 0).stat().st_mtime_ns == kept
    assert not list((tmp_path / "stopped").rglob("*.partial"))


def test_another_seed_or_policy_is_another_set(tmp_path: Path) -> None:
    assert presample(tmp_path / "set", prompts="3")[0] == 0
    for change, said in (
        (("--seed", "1"), "seed is 0 there and 1 now"),
        (("--set", "model.init=true"), "network is"),
        (("--guidance", "3"), "guidance is 1.0 there and 3.0 now"),
    ):
        code, _, stderr = presample(tmp_path / "set", *change, prompts="3")
        assert (code, said in stderr) == (2, True), stderr
    assert presample(tmp_path / "other", "--seed", "1", prompts="3")[0] == 0
    assert manifest(tmp_path / "other")["digest"] != manifest(tmp_path / "set")["digest"]
    assert read_header(shard_file(tmp_path / "other", 0))[1].rows == read_header(shard_file(tmp_path / "set", 0))[1].rows


def test_a_run_takes_the_set_as_its_anchor_data(tmp_path: Path) -> None:
    assert presample(tmp_path / "set", prompts="60", per_prompt="1")[0] == 0
    check_files(parse_config({"model": {"path": BASE}, "data": {"kind": "prepared", "path": str(tmp_path / "set")}, "prompts": {"kind": "glyph"}}))


def test_prompts_are_the_sources_own(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("".join(f'a sign that says "{i}"\n' for i in range(30)))
    listed, drawn = TextSource(str(file)), GlyphSource()
    assert [example.text for example in chosen(listed, None)] == [example.text for example in listed.examples]
    assert chosen(listed, 7) == list(listed.examples[:7])
    assert [example.text for example in chosen(drawn, 40)[:9]] == [example.text for example in chosen(drawn, 9)]
    assert {split_of(example.id) for example in chosen(drawn, 60)} == {"train", "dev", "test"}
    with pytest.raises(SourceError, match="only 30 distinct prompts, 31 were asked for"):
        chosen(listed, 31)
    with pytest.raises(SourceError, match="have no end; say with --prompts"):
        chosen(drawn, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "tpu7"], "--device tpu7 cannot be used here"),
        (["--set", "sampler.width=47"], "not a multiple"),
        (["--set", "prompts.kind=ocr_scenes"], "this text encoder holds 10 tokens"),
        (["--set", "sampler.kernal=cps"], "did you mean"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: list[str], message: str, tmp_path: Path) -> None:
    code, _, stderr = presample(tmp_path / "set", *arguments)
    assert (code, message in stderr) == (2, True), stderr
    assert len(stderr.splitlines()) == 1


def test_a_hub_id_is_known_by_its_files(tmp_path: Path, cached_policy: tuple[str, Path]) -> None:
    """By its name it looked like a policy in pixel space, whatever its codec."""
    name, snapshot = cached_policy
    code, _, stderr = presample(tmp_path / "set", "--set", f"model.path={name}", prompts="2")
    assert (code, stderr) == (0, "")
    assert manifest(tmp_path / "set")["model"] == str(snapshot)
    assert presample(tmp_path / "set", "--set", f"model.path={snapshot}", prompts="2")[0] == 0  # the same plan: the same policy


def test_a_video_policy_draws_clips_and_keeps_their_first_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "wan")
    clips = ["sampler.height=32", "sampler.width=32", "sampler.frames=9", "sampler.fps=16", f"model.path={tmp_path / 'wan'}", "prompts.kind=ocr_scenes"]
    changes = [word for item in clips for word in ("--set", item)]
    assert presample(tmp_path / "set", *changes, prompts="3", per_prompt="2")[0] == 0
    found = read_manifest(tmp_path / "set")
    assert (found.rows, found.shards, found.latent, found.frames, found.fps) == (6, 1, (16, 3, 4, 4), 9, 16.0)
    codec, examples = load_codec(tmp_path / "wan"), PreparedSource(str(tmp_path / "set"))
    for example in examples:
        assert example.latent is not None
        assert example.first is not None
        whole = codec.decode(torch.from_numpy(example.latent.load())[None])[0]
        assert np.abs(example.first.load().astype(int) - whole[0]).max() <= 1
    assert len({example.latent.load().tobytes() for example in examples if example.latent}) == 6
    monkeypatch.setattr(prepared, "SHARD_BYTES", 2 * (4 * 16 * 3 * 4 * 4 + 3 * 32 * 32))  # two samples
    assert presample(tmp_path / "small", *changes, prompts="3", per_prompt="2")[0] == 0
    assert read_manifest(tmp_path / "small").shards == 3
    code, _, stderr = presample(tmp_path / "set", *changes, "--set", "sampler.fps=8", prompts="3", per_prompt="2")
    assert (code, "fps is 16.0 there and 8.0 now" in stderr) == (2, True), stderr
    shutil.copytree(tmp_path / "small", tmp_path / "stopped")
    for name in ("prepared.json", "index.parquet", "broken.jsonl", "shards/00001.safetensors"):
        (tmp_path / "stopped" / name).unlink()
    assert presample(tmp_path / "stopped", *changes, prompts="3", per_prompt="2")[0] == 0
    assert manifest(tmp_path / "stopped") == manifest(tmp_path / "small")


@pytest.mark.parametrize("style", ["ti2v", "i2v"])
def test_samples_begin_with_the_frames_that_their_examples_give(style: Literal["ti2v", "i2v"], tmp_path: Path) -> None:
    """Of TI2V they stand in front of what is drawn, bit for bit; Wan 2.1's image-to-video draws around them."""
    write_tiny(tmp_path / "wan", style)
    (tmp_path / "pictures").mkdir()
    draw = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "pictures" / f"{i}.png")
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"a red circle {i}"}) for i in range(3)]
    (tmp_path / "pictures" / "metadata.jsonl").write_text("\n".join(lines))
    clips = ["sampler.height=32", "sampler.width=32", "sampler.frames=9", f"model.path={tmp_path / 'wan'}", "sampler.given_frames=1", "sampler.guidance=2"]
    changes = [word for item in [*clips, "prompts.kind=folder", f"prompts.path={tmp_path / 'pictures'}"] for word in ("--set", item)]
    code, _, stderr = presample(tmp_path / "set", *changes, prompts="3", per_prompt="2")
    assert code == 0, stderr
    codec, source = load_codec(tmp_path / "wan"), FolderSource(str(tmp_path / "pictures"))
    given = {example.text: codec.encode(first_frames(example, 1, 32, 32)[None])[0].numpy() for example in source.examples}
    for example in PreparedSource(str(tmp_path / "set")):
        assert example.latent is not None
        latent = example.latent.load()
        assert latent.shape[1] == 3
        assert np.array_equal(latent[:, :1], given[example.text]) == (style == "ti2v")
