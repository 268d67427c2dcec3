"""Recipes of real models through the whole pipeline, with `--tiny`: sizes and weights are swapped, all else is the recipe's."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from huggingface_hub import ModelCard
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file

from diffusion.lora import PREFIX, WEIGHTS
from diffusion.seeds import INITIAL, step_noise
from tests.pipeline import ROOT, Run, check_ledger, command, records, settings
from trainer.config.load import load_config
from trainer.run.resume import registered_step

SD35 = sorted(p.stem for p in (ROOT / "recipes").glob("sd35-*.yaml"))
PROMPTS = ['A sign "407" on a wall', "a small red circle"]
STEPS = 4
EXACT = settings("model.dtype=float32", "model.base_dtype=float32", "model.text_dtype=float32")
"""Types of diffusers' pipeline, so that pictures can be equal."""


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


def ddrl(*arguments: str) -> str:
    done = subprocess.run(command(*arguments), cwd=ROOT, text=True, capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize("recipe", SD35)
def test_a_recipe_runs_to_its_report(recipe: str, tiny: Callable[..., Run]) -> None:
    run = tiny(recipe)
    code, out, err = run.finish()
    assert code == 0, (out, err)
    assert re.search(r"^  sampler\.height +512 → 32$", out, re.MULTILINE)
    full, config = load_config(ROOT / "recipes" / f"{recipe}.yaml"), load_config(run.folder / "config.yaml")
    assert (run.folder / "config.yaml").read_text().startswith("# tiny: sizes and weights are swapped")
    assert (config.objective, config.optimizer, config.model.lora) == (full.objective, full.optimizer, full.model.lora)
    check_ledger(run.folder, config.updates, config.rollout.groups_per_step)
    updates = records(run.folder, "update")
    assert all(update["skipped"] == 0 for update in updates)
    assert all(("data_loss" in update) == full.uses_data for update in updates)
    assert all(("reverse_kl" in update) == (full.objective.kl_weight > 0) for update in updates)
    if "ocr" in full.rewards:  # nothing can be read: no group's rewards vary, and nothing broke
        assert all(update["zero_variance_groups"] == config.rollout.groups_per_step for update in updates)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert summary["missing"] == [], out
    assert set(summary["rewards"]) == {*full.rewards, *full.held_out_rewards}
    assert (run.folder / "report.html").stat().st_size > 10_000
    assert run.leftovers() == []


@pytest.mark.long
def test_stopped_resumed_exported_and_opened_by_diffusers(tiny: Callable[..., Run], tmp_path: Path) -> None:
    """Two FSDP ranks; a checkpoint, an end in the middle, the rest; then both forms of the export are opened and draw what ddrl draws."""
    learning = settings("learner.ranks=2", "optimizer.lr=0.01", "objective.data_weight=1.0")
    run = tiny("sd35-medium-ocr", *learning)
    run.wait_for(lambda: registered_step(run.folder / "checkpoints") >= 2, "the first checkpoint")
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.finish()
    assert code in (0, 130), (out, err)  # 0: it was quicker
    if code == 130:
        run = tiny("sd35-medium-ocr", *learning, "--resume")
        run.succeed()
    check_ledger(run.folder, 4, 2)
    assert (run.folder / "report.html").exists()

    exported, drawn = tmp_path / "exported", tmp_path / "drawn"
    ddrl("export", str(run.folder), str(exported), "--hub-folder")
    card = ModelCard.load(exported / "README.md")
    loss = json.loads((run.folder / "eval" / "test-000004-raw.json").read_text())["diffusion_loss"]
    assert f"| {loss:.4f} |" in card.text
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    ddrl("sample", str(exported), "--prompts", str(tmp_path / "prompts.txt"), "--steps", str(STEPS), "--out", str(drawn), *EXACT)
    ours = np.stack([np.asarray(Image.open(drawn / f"{i:04d}.png")).astype(int) for i in range(len(PROMPTS))])
    whole = pictures(opened(exported))
    assert ours.std() > 1
    assert np.abs(whole - ours).max() <= 1

    base = opened(Path(load_config(run.folder / "config.yaml").model.path))
    before = pictures(base)
    base.load_lora_weights(exported, weight_name=WEIGHTS)
    adapted = pictures(base)
    stored = load_file(exported / WEIGHTS)
    loaded = {re.sub(r"\.default(_\d+)?", "", name): tensor for name, tensor in base.transformer.state_dict().items() if ".lora_" in name}
    assert {PREFIX + name for name in loaded} == stored.keys()
    assert all(torch.equal(loaded[name.removeprefix(PREFIX)], tensor) for name, tensor in stored.items())
    assert np.abs(adapted - before).mean() > 2 * np.abs(adapted - whole).mean()  # the export's network is held in bfloat16


def opened(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)


@torch.no_grad()
def pictures(pipeline: StableDiffusion3Pipeline) -> NDArray[Any]:
    """What diffusers draws of the prompts, from the noise that `ddrl sample` starts from."""
    pipeline.set_progress_bar_config(disable=True)
    made = []
    for number, prompt in enumerate(PROMPTS):
        noise = step_noise(0, number, 0, INITIAL, (16, 4, 4))[None]
        options = {"height": 32, "width": 32, "num_inference_steps": STEPS, "guidance_scale": 4.5, "max_sequence_length": 128}
        made.append(np.asarray(pipeline(prompt, latents=noise, **options).images[0]).astype(int))
    return np.stack(made)
