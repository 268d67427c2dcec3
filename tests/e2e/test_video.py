"""Whole runs on clips, with tiny policies of the published layouts: from captioned mp4 files to an export that diffusers opens, and a page where
clips play."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline

from actors.clips import write_clip
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.families.cosmos import tiny as cosmos
from diffusion.families.wan import tiny as wan
from tests.e2e.test_kernels import FEW, trained
from tests.pipeline import ROOT, Run, command, records, settings
from tests.unit.diffusion.cosmos import pipeline as open_cosmos

SIDE, FRAMES, CLIPS = 32, 9, 60
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any], list[str]]] = {
    "wan": (wan.write_tiny, WanPipeline.from_pretrained, []),
    "cosmos": (cosmos.write_tiny, open_cosmos, []),
    "cosmos, some begin with a picture": (cosmos.write_tiny, open_cosmos, ["--set", "sampler.given_frames=[0, 1]", "--set", "data.pairing=own"]),
    "wan, all begin with a picture": (
        lambda folder: wan.write_tiny(folder, "i2v"),
        WanImageToVideoPipeline.from_pretrained,
        ["--set", "sampler.given_frames=1", "--set", "encoder.actors=1"],
    ),
}


def write_clips(folder: Path) -> None:
    """Captioned clips of a bright block that moves, longer than what is sampled."""
    folder.mkdir()
    draw, lines = np.random.default_rng(0), []
    for i in range(CLIPS):
        clip = np.full((FRAMES + 4, SIDE, SIDE, 3), draw.integers(0, 80, 3), np.uint8)
        x, y = draw.integers(0, SIDE - 8, 2)
        for t, frame in enumerate(clip):
            left = (x + t * (1 if i % 2 else -1)) % (SIDE - 8)
            frame[y : y + 8, left : left + 8] = 230
        write_clip(folder / f"{i:03d}.mp4", clip, 16.0)
        lines.append(json.dumps({"file_name": f"{i:03d}.mp4", "text": f"a small square number {i} on the black"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def video(policy: Path, clips: Path) -> list[str]:
    return settings(
        f"model.path={policy}",
        "data.kind=folder",
        f"data.path={clips}",
        "prompts.kind=data",
        *(f"sampler.height={SIDE}", f"sampler.width={SIDE}", f"sampler.frames={FRAMES}", "sampler.steps=4", "sampler.trained_steps=[0, 1]"),
        "sampler.eval_steps=4",
        'rewards={"scene.motion": {"weight": 1.0}}',
        'held_out_rewards=["scene.flicker"]',
        'fleet.rewards={"scene": {"kind": "scene"}}',
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_clips(kind: str, start: Callable[..., Run], tmp_path: Path) -> None:
    write, opened, more = KINDS[kind]
    write(tmp_path / "policy")
    write_clips(tmp_path / "clips")
    run = start("run", *FEW, *video(tmp_path / "policy", tmp_path / "clips"), *more)
    _, updates = trained(run)
    assert all(update["ratio_deviation"] < 1e-3 and update["data_loss"] > 0 for update in updates)
    assert all(update["rewards"]["scene.motion"] > 0 for update in updates)
    final = [record for record in records(run.folder, "evaluation") if record["split"] == "test"]
    assert [set(record["rewards"]) for record in final] == [{"scene.motion", "scene.flicker"}] * 2
    for name in ("before", "after"):
        with av.open(str(run.folder / "samples" / f"{name}.mp4")) as file:
            assert file.streams.video[0].frames == FRAMES
    assert (run.folder / "report.html").read_text().count("<video ") == 2

    (export,) = (run.folder / "exports").glob("step-*2")
    theirs = opened(export).transformer.state_dict()
    ours = load_policy(ModelConfig(path=str(export))).transformer.state_dict()
    before = load_policy(ModelConfig(path=str(tmp_path / "policy"))).transformer.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    assert any(not torch.equal(before[name], ours[name]) for name in ours)


@pytest.mark.long
def test_clips_are_drawn_from_the_command_line(start: Callable[..., Run], tmp_path: Path) -> None:
    wan.write_tiny(tmp_path / "policy")
    write_clips(tmp_path / "clips")
    (tmp_path / "prompts.txt").write_text("a red circle\na blue square\n")
    line = command("sample", "recipes/glyph-ocr.yaml", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "out"))
    done = subprocess.run([*line, *video(tmp_path / "policy", tmp_path / "clips")], cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(text) for text in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [(one["file"], one["frames"], one["fps"]) for one in lines] == [("0000.mp4", FRAMES, 16.0), ("0001.mp4", FRAMES, 16.0)]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"0000.mp4", "0001.mp4", "grid.png", "samples.jsonl"}


@pytest.mark.long
def test_a_run_on_a_prepared_set_of_clips(start: Callable[..., Run], tmp_path: Path) -> None:
    """Each group's own clip is its anchor datum, its latent read from the set."""
    wan.write_tiny(tmp_path / "policy")
    write_clips(tmp_path / "clips")
    line = command("prepare-data", str(tmp_path / "clips"), str(tmp_path / "set"), "--model", str(tmp_path / "policy"))
    line += ["--size", f"{SIDE}x{SIDE}", "--frames", str(FRAMES), "--shard-rows", "20"]
    subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=400, check=True)
    prepared = settings("data.kind=prepared", f"data.path={tmp_path / 'set'}", "data.pairing=own", "replay.store_dtype=bfloat16")
    run = start("run", *FEW, *video(tmp_path / "policy", tmp_path / "clips"), *prepared)
    _, updates = trained(run)
    assert all(update["ratio_deviation"] < 1e-3 and update["data_loss"] > 0 for update in updates)
    assert all(record["diffusion_loss"] > 0 for record in records(run.folder, "evaluation"))
