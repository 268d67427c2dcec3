"""`ddrl sample`: what it reads, what it writes, and how it says no."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from typer.testing import CliRunner

from diffusion.engine.generate import DiffusionEngine, Sample, SamplingParams
from diffusion.families.sd3.network import SD3Transformer
from diffusion.families.wan.tiny import write_tiny
from trainer.cli.main import app
from trainer.cli.sample import parse_sizes, parse_steps, spread

ROOT = Path(__file__).parents[4]
RECIPE = str(ROOT / "recipes" / "glyph-ocr.yaml")


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.txt"
    file.write_text('a sign that says "407"\n\na sign that says "22"\n')
    return file


def sample(*arguments: str) -> tuple[int, str, str]:
    done = CliRunner().invoke(app, ["sample", RECIPE, "--set", f"model.path={ROOT / 'recipes' / 'glyph-base'}", *arguments])
    return done.exit_code, done.stdout, done.stderr


def test_every_mix_of_sizes_and_steps_is_drawn(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "pictures"
    code, stdout, stderr = sample("--prompts", str(prompts), "--size", "16x48,32x96", "--steps", "2,3", "-n", "9", "--out", str(out))
    assert (code, stderr) == (0, "")
    assert "9 samples in " in stdout
    assert "tokens a forward pass" in stdout
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert Counter((line["height"], line["steps"]) for line in lines) == {(16, 2): 3, (16, 3): 2, (32, 2): 2, (32, 3): 2}
    assert Counter(line["prompt"] for line in lines) == {'a sign that says "407"': 5, 'a sign that says "22"': 4}
    pictures = []
    for line in lines:
        with Image.open(out / line["file"]) as image:
            assert image.size == (line["width"], line["height"])
            pictures.append(np.asarray(image).tobytes())
    assert len(set(pictures)) == 9
    with Image.open(out / "grid.png") as grid:
        assert grid.size == (8 * (96 + 8), 2 * (32 + 18))


def test_the_same_seed_draws_the_same_pictures_and_another_others(prompts: Path, tmp_path: Path) -> None:
    drawn = []
    for name, seed in (("a", "0"), ("b", "0"), ("c", "1")):
        out = tmp_path / name
        assert sample("--prompts", str(prompts), "--steps", "2", "-n", "2", "--noise", "--seed", seed, "--out", str(out))[0] == 0
        drawn.append((out / "0001.png").read_bytes())
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "16"], "--size 16: give HEIGHTxWIDTH in pixels"),
        (["--size", "0x48"], "--size 0x48"),
        (["--steps", "8,x"], "--steps 8,x: give numbers of denoising steps"),
        (["--size", "17x48"], "not a multiple of the patch size"),
        (["--size", "160x480"], "pos_embed_max_size"),
        (["--set", "sampler.kernal=cps"], "did you mean"),
        (["--set", "model.path=nowhere"], "nowhere does not exist"),
        (["--device", "tpu7"], "--device tpu7 cannot be used here"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
    ],
)
def test_mistakes_are_one_line_and_status_2(arguments: list[str], message: str, prompts: Path, tmp_path: Path) -> None:
    code, _, stderr = sample("--prompts", str(prompts), "--out", str(tmp_path / "out"), *arguments)
    assert code == 2
    assert message in stderr
    assert len(stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_holds_something_is_left_alone(prompts: Path, tmp_path: Path) -> None:
    code, _, stderr = sample("--prompts", str(prompts), "--out", str(tmp_path))
    assert (code, "is not empty; give another folder with --out" in stderr) == (2, True)
    assert [f.name for f in tmp_path.iterdir()] == ["prompts.txt"]


def test_a_file_in_the_folders_place_is_said_before_anything_is_drawn(prompts: Path) -> None:
    code, stdout, stderr = sample("--prompts", str(prompts), "--out", str(prompts))
    assert (code, stdout, "give another folder with --out" in stderr) == (2, "", True)


def test_a_fault_while_drawing_is_not_the_callers_mistake(prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(*inputs: object, **conditioning: object) -> None:
        raise RuntimeError("illegal instruction")

    monkeypatch.setattr(SD3Transformer, "forward", forward)
    code, _, stderr = sample("--prompts", str(prompts), "--out", str(tmp_path / "out"))
    assert (code, "denoising step of 2 sequences failed: RuntimeError: illegal instruction" in stderr) == (1, True)


def test_prompts_that_are_not_there_or_cannot_be_drawn(tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text('a sign that says "123456789"\n')
    for path, message in ((tmp_path / "none.txt", "cannot be read"), (file, "quoted characters")):
        code, _, stderr = sample("--prompts", str(path), "--out", str(tmp_path / "out"))
        assert (code, message in stderr) == (2, True), stderr


def test_lists_of_sizes_and_steps() -> None:
    assert parse_sizes("16x48,32x96") == [(16, 48), (32, 96)]
    assert parse_steps("8,20") == [8, 20]
    for text in ("", "16x", "axb", "1x2x3", "16x48,"):
        with pytest.raises(ValueError, match="--size"):
            parse_sizes(text)
    for text in ("", "-1", "0", "2.5", "8,"):
        with pytest.raises(ValueError, match="--steps"):
            parse_steps(text)


@given(prompts=st.integers(1, 7), choices=st.integers(1, 6), rounds=st.integers(1, 3))
def test_samples_cover_prompts_and_choices_evenly(prompts: int, choices: int, rounds: int) -> None:
    texts, params = [str(i) for i in range(prompts)], [SamplingParams(8, 8, i + 1) for i in range(choices)]
    counts = Counter((text, p.steps) for text, p in spread(texts, params, prompts * choices * rounds))
    assert set(counts.values()) == {rounds}
    assert len(counts) == prompts * choices


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder, draw = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for i in range(2):
        Image.fromarray(draw.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": f"{i}.png", "text": f"a red circle {i}"}) + "\n" for i in range(2)))
    return folder


def test_clips_begin_with_the_pictures_of_a_folder_or_with_one_for_all(pictures: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tiny(tmp_path / "wan", "ti2v")
    clips = [f"model.path={tmp_path / 'wan'}", "sampler.height=32", "sampler.width=32", "sampler.frames=5", "sampler.eval_steps=2"]
    changes = [word for item in [*clips, "sampler.given_frames=[0, 1]"] for word in ("--set", item)]
    drawn: list[np.ndarray | None] = []
    draw = DiffusionEngine.generate

    def generate(engine: DiffusionEngine, texts: Sequence[str], params: Sequence[SamplingParams], told: Any) -> list[list[Sample]]:
        drawn.extend(one.given for one in params)
        return draw(engine, texts, params, told)

    monkeypatch.setattr(DiffusionEngine, "generate", generate)
    for name, asked in {"own": [str(pictures)], "one": [str(pictures), "--given", str(pictures / "1.png")], "none": [str(prompts), "-n", "2"]}.items():
        code, _, stderr = sample("--prompts", *asked, "--out", str(tmp_path / name), *changes)
        assert code == 0, stderr
        assert {file.name for file in (tmp_path / name).iterdir()} == {"0000.mp4", "0001.mp4", "grid.png", "samples.jsonl"}
    first, second = (np.asarray(Image.open(pictures / f"{i}.png"))[None] for i in range(2))
    for frames, expected in zip(drawn, [first, second, second, second, None, None], strict=True):
        assert frames is None if expected is None else frames is not None and np.array_equal(frames, expected)
    code, _, stderr = sample("--prompts", str(prompts), "--out", str(tmp_path / "no"), *changes, "--given-frames", "1")
    assert (code, "has a text only" in stderr) == (2, True), stderr
    code, _, stderr = sample("--prompts", str(prompts), "--given", "gone.png", "--out", str(tmp_path / "no"), *changes)
    assert (code, "--given gone.png: there is no such file" in stderr) == (2, True), stderr
