"""The model card: the hub's own reader reads it, and its numbers are the run's."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from diffusion.families.sd3.tiny import write_tiny
from diffusion.lora import WEIGHTS
from trainer.cli.main import app
from trainer.config.load import load_config
from trainer.report.summary import changes
from trainer.run.folder import RunFolder

ROOT = Path(__file__).resolve().parents[4]
BEFORE = {"rewards": {"ocr": 0.25, "jpeg": -0.5}, "diffusion_loss": 1.25, "diversity": 0.375}
AFTER = {"rewards": {"ocr": 0.53125, "jpeg": -0.25}, "diffusion_loss": 1.3125, "diversity": 0.36}


def record(means: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A test evaluation of four prompts with these means."""
    spread = (-0.1, 0.05, 0.02, 0.03)
    per_prompt = {
        "rewards": {name: [mean + s * mean for s in spread] for name, mean in means["rewards"].items()},
        "sub_scores": {},
        "diffusion_loss": [means["diffusion_loss"] + s for s in spread],
        "diversity": [means["diversity"] + s for s in spread],
    }
    return {"prompts": 4, "set": "one", "revisions": {"ocr": "r1", "jpeg": "j1"}, "sub_scores": {}, "failed": {}, **means, "per_prompt": per_prompt, **more}


def finished_run(folder: Path, recipe: str, policy: Path, *overrides: str) -> Path:
    """A run folder with an export of step 4 and evaluations before and after."""
    run = RunFolder(folder)
    run.open(load_config(ROOT / "recipes" / recipe, ["held_out_rewards=[jpeg]", *overrides]), resume=False)
    run.close()
    shutil.copytree(policy, run.exports / "step-000004")
    (folder / "eval").mkdir()
    (folder / "eval" / "test-000000-raw.json").write_text(json.dumps(record(BEFORE)))
    (folder / "eval" / "test-000004-raw.json").write_text(json.dumps(record(AFTER)))
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Of SD3.5-medium with an adapter."""
    write_tiny(tmp_path / "policy")
    (tmp_path / "policy" / WEIGHTS).write_bytes(b"an adapter")
    return finished_run(tmp_path / "run", "sd35-medium-ocr.yaml", tmp_path / "policy")


def card_of(run: Path, *arguments: str) -> ModelCard:
    done = CliRunner().invoke(app, ["export", str(run), str(run.parent / "hub"), "--hub-folder", *arguments])
    assert done.exit_code == 0, done.output
    return ModelCard.load(run.parent / "hub" / "README.md")


def rows(text: str) -> dict[str, list[str]]:
    """Rows of the card's tables by their first cell."""
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return {first: rest for first, *rest in cells}


def test_the_hub_reads_its_header(run: Path) -> None:
    card = card_of(run)
    assert card.data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert card.data.to_dict()["base_model_relation"] == "adapter"
    assert (card.data.library_name, card.data.pipeline_tag, card.data.license) == ("diffusers", "text-to-image", "other")
    assert card.data.license_link == "https://huggingface.co/stabilityai/stable-diffusion-3.5-medium"
    assert {"lora", "ddrl", "reinforcement-learning"} <= set(card.data.tags or ())
    assert "stand under its licence" in card.text
    assert "anchor data: prepared `ocr-anchors`" in card.text
    assert str(run.parent) not in card.content  # nothing of this machine


def test_numbers_are_the_runs(run: Path) -> None:
    table, found = rows(card_of(run).text), changes(record(BEFORE), record(AFTER))
    for name, kind in (("ocr", "trained"), ("jpeg", "held out")):
        before, after, gain, error = table[f"{name} ({kind})"]
        assert (float(before), float(after)) == pytest.approx((BEFORE["rewards"][name], AFTER["rewards"][name]), abs=1e-4)
        assert (float(gain), float(error)) == pytest.approx((found["rewards"][name]["gain"], found["rewards"][name]["stderr"]), abs=1e-4)
    before, after, rise, _ = table["Diffusion loss"]
    assert (float(before), float(after)) == (1.25, 1.3125)
    assert float(rise.removesuffix(" %")) == pytest.approx(100 * found["diffusion_loss_rise"], abs=0.01)
    assert table["rollouts an update"] == ["8 groups of 8"]


def test_what_was_not_evaluated_or_failed_is_no_number(run: Path) -> None:
    failed = {"rewards": {"jpeg": -0.25}, "failed": {"ocr": 1}}
    (run / "eval" / "test-000004-raw.json").write_text(json.dumps(record(AFTER) | failed | {"set": "another"}))
    card = card_of(run)
    assert rows(card.text)["ocr (trained)"] == ["0.2500", "–", "–", "–"]
    assert "Not compared (all): another evaluation set (one, another)" in card.text
    assert "ocr: no mean, because 1 prompts have no score." in card.text
    (run / "eval" / "test-000004-raw.json").unlink()
    assert "holds no test evaluation of these weights" in card_of(run, "--overwrite").text


def test_it_says_how_to_open_what_is_there(run: Path, tmp_path: Path) -> None:
    text = card_of(run).text
    assert "StableDiffusion3Pipeline.from_pretrained" in text
    assert f'load_lora_weights("FOLDER", weight_name="{WEIGHTS}")' in text
    base = ROOT / "recipes" / "glyph-base"
    (tmp_path / "glyph").mkdir()
    glyph = card_of(finished_run(tmp_path / "glyph" / "run", "glyph-ocr.yaml", base, f"model.path={base}"))
    assert 'SD3Transformer2DModel.from_pretrained("FOLDER", subfolder="transformer")' in glyph.text
    assert "StableDiffusion3Pipeline" not in glyph.text
    assert glyph.data.base_model is None
    assert "`glyph-base` after 4 updates" in glyph.text


def test_without_the_option_there_is_no_card(run: Path) -> None:
    done = CliRunner().invoke(app, ["export", str(run), str(run.parent / "plain")])
    assert done.exit_code == 0, done.output
    assert not (run.parent / "plain" / "README.md").exists()
