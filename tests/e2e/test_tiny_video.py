"""Recipes of video policies through the whole pipeline, with `--tiny` and a tiny VideoAlign: to a report with clips, and to diffusers' own pipelines."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from actors.clips import STRIP, strip
from actors.conditioning import Subjects, first_frames
from actors.pictures import CELL, caption, contact_sheet
from actors.sources.draws import held_out_examples, prompt_source
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from diffusion.lora import PREFIX, WEIGHTS
from diffusion.seeds import INITIAL, step_noise
from tests.pipeline import ROOT, Run, check_ledger, command, records, settings
from tests.unit.diffusion.cosmos import pipeline as open_cosmos
from tests.unit.diffusion.euler import on_grid
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.run.resume import registered_step

RECIPES = sorted(p.stem for p in (ROOT / "recipes").glob("*videoalign*.yaml"))
FRAMES, FPS, STEPS = 9, 16, 4
PROMPT = "a small red circle"
EXACT = settings("model.dtype=float32", "model.base_dtype=float32", "model.text_dtype=float32", "model.grid=diffusers", "sampler.kernel=ddim_eta")
"""Types and grid of diffusers' pipelines, and the ODE's plain steps, so that clips can be equal."""
FAMILIES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "wan21-1.3b-videoalign": ("WanPipeline", lambda folder: WanPipeline.from_pretrained(folder, torch_dtype=torch.float32)),
    "wan21-14b-i2v-videoalign": (
        "WanImageToVideoPipeline",
        lambda folder: WanImageToVideoPipeline.from_pretrained(folder, torch_dtype=torch.float32),
    ),
    "cosmos25-2b-videoalign": ("Cosmos2_5_PredictBasePipeline", open_cosmos),
}


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start tiny runs of recipes, with a cache of their own; they are ended whatever happens."""
    runs: list[Run] = []

    def make(recipe: str, *arguments: str) -> Run:
        found = Run(tmp_path / "run", "--tiny", *arguments, recipe=f"recipes/{recipe}.yaml", environment={"XDG_CACHE_HOME": str(tmp_path / "cache")})
        runs.append(found)
        return found

    yield make
    for run in runs:
        run.end()


@pytest.mark.long
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_to_its_report(recipe: str, tiny: Callable[..., Run]) -> None:
    run = tiny(recipe)
    code, out, err = run.finish()
    assert code == 0, (out, err)
    assert re.search(r"^  sampler\.frames +\d+ → 9$", out, re.MULTILINE)
    full, config = load_config(ROOT / "recipes" / f"{recipe}.yaml"), load_config(run.folder / "config.yaml")
    assert (config.objective, config.optimizer, config.model.lora, config.rewards) == (full.objective, full.optimizer, full.model.lora, full.rewards)
    assert config.sampler.given_frames == full.sampler.given_frames
    check_ledger(run.folder, config.updates, config.rollout.groups_per_step)
    updates = records(run.folder, "update")
    assert all(update["skipped"] == 0 and "failed_scores" not in update for update in updates)
    assert all(("data_loss" in update) == full.uses_data for update in updates)
    assert all(("reverse_kl" in update) == (full.objective.kl_weight > 0) for update in updates)
    assert all(update["rewards_std"]["videoalign"] > 0 for update in updates)  # a judge of random weights tells clips of noise apart
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["missing"] == [], out
    assert set(summary["rewards"]) == {*full.rewards, *full.held_out_rewards}
    for name in ("before", "after"):
        with av.open(str(run.folder / "samples" / f"{name}.mp4")) as file:
            assert (file.streams.video[0].frames, file.streams.video[0].average_rate) == (FRAMES, FPS)
    assert (run.folder / "report.html").read_text().count("<video ") >= 2
    if recipe.startswith("cosmos"):
        check_given(run.folder, config)
    assert run.leftovers() == []


def check_given(folder: Path, config: RunConfig) -> None:
    """In the sheets of samples, drawn before training, in its course and after it, a clip that is given a frame begins with it, bit for bit as it is
    after encoding and decoding; every other clip of these recipes is given one."""
    policy, height, width = load_policy(config.model), config.sampler.height, config.sampler.width
    examples = held_out_examples(prompt_source(config.prompts, config.data), "test", config.evaluation.grid_prompts)
    subjects = Subjects(config.seed, config.prompts, config.data, config.sampler).held_out(examples, 0)
    scale = max(1, STRIP * CELL // (STRIP * width))
    sheets = [np.asarray(Image.open(file)) for file in sorted((folder / "samples").glob("*.png"))]
    assert len(sheets) == 3
    seen = 0
    for i, (example, subject) in enumerate(zip(examples, subjects, strict=True)):
        if subject.given:
            frames = policy.codec.encode(first_frames(example, policy.codec.pixel_frames(subject.given), height, width)[None])
            first = Image.fromarray(policy.codec.decode(frames)[0][0]).resize((width * scale, height * scale), Image.Resampling.NEAREST)
            left = i % 2 * (STRIP * width * scale + 8) + 4
            columns = [sheet[:, left : left + width * scale] for sheet in sheets]
            places = [[y for y in range(len(c) - height * scale) if np.array_equal(c[y : y + height * scale], np.asarray(first))] for c in columns]
            assert all(len(found) == 1 for found in places), (i, places)
            seen += 1
    assert seen == len(subjects) // 2


@pytest.mark.long
@pytest.mark.parametrize("recipe", FAMILIES)
def test_stopped_resumed_exported_and_opened_by_diffusers(recipe: str, tiny: Callable[..., Run], tmp_path: Path) -> None:
    """A checkpoint, an end in the middle, the rest; then the export, and where there is one its adapter, in the policy's own pipeline class."""
    learning = settings("optimizer.lr=0.01", "optimizer.warmup=0")
    run = tiny(recipe, *learning)
    run.wait_for(lambda: registered_step(run.folder / "checkpoints") >= 2, "the first checkpoint")
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.finish()
    assert code in (0, 130), (out, err)  # 0: it was quicker
    if code == 130:
        run = tiny(recipe, *learning, "--resume")
        run.succeed()
    config = load_config(run.folder / "config.yaml")
    check_ledger(run.folder, config.updates, config.rollout.groups_per_step)
    assert (run.folder / "report.html").exists()

    exported = tmp_path / "exported"
    done = subprocess.run(command("export", str(run.folder), str(exported)), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    kind, opened = FAMILIES[recipe]
    pipeline, ours = opened(exported), load_policy(ModelConfig(path=str(exported))).transformer.state_dict()
    assert type(pipeline).__name__ == kind
    theirs = pipeline.transformer.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    base = opened(Path(config.model.path))
    before = base.transformer.state_dict()
    assert any(not torch.equal(before[name].to(ours[name].dtype), ours[name]) for name in ours)
    drawn(pipeline)
    check_drawn(pipeline, exported, config, tmp_path)
    if config.model.lora.rank:
        base.load_lora_weights(exported, weight_name=WEIGHTS)
        stored = load_file(exported / WEIGHTS)
        loaded = {re.sub(r"\.default(_\d+)?", "", name): tensor for name, tensor in base.transformer.state_dict().items() if ".lora_" in name}
        assert {PREFIX + name for name in loaded} == stored.keys()
        assert all(torch.equal(loaded[name.removeprefix(PREFIX)], tensor) for name, tensor in stored.items())


@torch.no_grad()
def drawn(pipeline: Any) -> None:
    """A clip of the pipeline, with its own solver."""
    pipeline.set_progress_bar_config(disable=True)
    given = {"image": Image.new("RGB", (48, 32), "red")} if isinstance(pipeline, WanImageToVideoPipeline) else {}
    clips = pipeline(prompt=PROMPT, height=32, width=48, num_frames=FRAMES, num_inference_steps=2, output_type="np", **given).frames
    assert clips.shape == (1, FRAMES, 32, 48, 3)


def check_drawn(pipeline: Any, exported: Path, config: RunConfig, folder: Path) -> None:
    """`ddrl sample` of an export draws what its pipeline draws, with a picture that the clip begins with and without, as the policy can."""
    height, width, cosmos = config.sampler.height, config.sampler.width, type(pipeline).__name__.startswith("Cosmos")
    picture = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "first.png")
    (folder / "prompts.txt").write_text(PROMPT + "\n")
    codec = load_policy(ModelConfig(path=str(exported))).codec
    for given in [True] if isinstance(pipeline, WanImageToVideoPipeline) else [False, True] if cosmos else [False]:
        out = folder / f"drawn-{given}"
        line = command("sample", str(exported), "--prompts", str(folder / "prompts.txt"), "--steps", str(STEPS), "--out", str(out), *EXACT)
        line += ["--given", str(folder / "first.png"), "--given-frames", "1"] if given else []
        done = subprocess.run(line, cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        found = np.asarray(Image.open(out / "grid.png")).astype(int)
        kept = codec.encode(picture[None, None])[0] if cosmos and given else torch.zeros(16, 0, height // 8, width // 8)
        frames = theirs(pipeline, config, kept, Image.fromarray(picture) if given else None)
        assert frames.std() > 1
        assert frames.shape == (FRAMES, height, width, 3)
        sheet = contact_sheet([strip(frames)], [f"{caption(PROMPT)} · {STEPS}"], columns=8)
        assert np.abs(found - np.asarray(sheet)).max() <= 1
        if kept.shape[1]:  # the first frame hangs on its own latent alone: bit for bit what the picture becomes
            assert np.array_equal(found[2 : 2 + height, 4 : 4 + width], codec.decode(kept[None])[0][0])


@torch.no_grad()
def theirs(pipeline: Any, config: RunConfig, kept: Tensor, picture: Image.Image | None) -> NDArray[np.uint8]:
    """What the pipeline draws from the noise that `ddrl sample` starts from; given frames as they were given, not with its 0.5 % of noise on them."""
    s, k = config.sampler, kept.shape[1]
    noise = step_noise(0, 0, 0, INITIAL, (16, FRAMES // 4 + 1 - k, s.height // 8, s.width // 8))
    with on_grid(pipeline):
        latent: Tensor = pipeline(
            prompt=PROMPT,
            negative_prompt=s.negative_prompt,
            height=s.height,
            width=s.width,
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=s.guidance - (1 if type(pipeline).__name__.startswith("Cosmos") else 0),
            latents=torch.cat([torch.zeros_like(kept), noise], 1)[None],
            output_type="latent",
            **({} if picture is None else {"image": picture}),
        ).frames[0]
    vae = pipeline.vae
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std))
    whole = torch.cat([kept, latent[:, k:]], 1) * std + mean
    clip = pipeline.video_processor.postprocess_video(vae.decode(whole[None]).sample, output_type="np")[0]
    return (255 * clip).round().astype(np.uint8)
