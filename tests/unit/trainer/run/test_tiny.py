"""`--tiny`: weights of the recipe's kind, written once, and what a person is told."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from actors.prepared import read_manifest
from actors.sources.folder import FolderSource
from actors.sources.prepared import PreparedSource
from diffusion.checkpoint import load_codec, load_policy
from diffusion.families import registry
from diffusion.families.wan.tiny import write_tiny as write_wan
from services.contract import ItemScore
from services.media.base import Media
from services.scorers.registry import build_scorer
from trainer.cli.main import app
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.run.preflight import check_files, check_policy
from trainer.run.tiny import tiny_config
from trainer.run.tiny_anchors import ANCHORS
from trainer.run.tiny_cache import cache_folder

RECIPES = Path(__file__).resolve().parents[4] / "recipes"
SD35 = RECIPES / "sd35-medium-ocr.yaml"


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cache for all tests here, and nobody else's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def test_an_sd3_recipe_becomes_one_that_two_cores_run(tmp_path: Path) -> None:
    made = tiny_config(SD35, [], tmp_path / "run")
    config = made.config
    check_files(config)
    check_policy(config)
    assert json.loads((Path(config.model.path) / "model_index.json").read_text())["_class_name"] == "StableDiffusion3Pipeline"
    policy = load_policy(config.model)
    assert sum(p.numel() for p in policy.transformer.parameters()) < 200_000
    assert "norm_added_k" in "".join(policy.transformer.state_dict())  # qk-norm
    assert "attn2" in "".join(policy.transformer.state_dict())  # the second attention of SD3.5-medium
    assert config.replay.payloads == str(tmp_path / "run" / "payloads")
    assert config.name == "sd35-medium-ocr-tiny"
    full = load_config(SD35)
    assert config.model.model_copy(update={"path": full.model.path}) == full.model
    assert config.data.kind == "prepared"
    anchors = PreparedSource(str(config.data.path))
    assert {example.split for example in anchors} == {"train", "dev", "test"}
    assert read_manifest(anchors.folder).latent == (16, 4, 4)
    before = {p: p.stat().st_mtime_ns for p in cache_folder().rglob("*")}
    assert tiny_config(SD35, [], tmp_path / "run") == made  # a run that goes on finds the same files
    assert {p: p.stat().st_mtime_ns for p in cache_folder().rglob("*")} == before


def test_what_is_changed_is_told_and_what_is_set_stays() -> None:
    made = tiny_config(SD35, ["updates=9", "sampler.height=48", "name=mine"])
    changed = {key: (before, now) for key, before, now in made.changes}
    assert changed["sampler.width"] == (512, 32)
    assert changed["model.path"][0] == "stabilityai/stable-diffusion-3.5-medium"
    assert not {"updates", "sampler.height", "name", "model.revision", "objective.clip"} & changed.keys()
    assert (made.config.updates, made.config.sampler.height, made.config.name) == (9, 48, "mine")
    table = made.table()
    assert "  sampler.width                 512 → 32" in table
    assert "rewards say nothing" in table[-1]


def test_the_glyph_policy_is_small_itself() -> None:
    recipe = RECIPES / "glyph-ocr.yaml"
    made = tiny_config(recipe, [f"model.path={RECIPES / 'glyph-base'}"])
    assert made.config.model.path == str(RECIPES / "glyph-base")
    assert made.config.data == load_config(recipe).data
    assert not any("rewards say nothing" in line for line in made.table())


def test_a_reward_on_towers_gets_tiny_ones() -> None:
    config = tiny_config(RECIPES / "sd35-medium-pickscore.yaml", [], data=False).config
    settings = config.fleet.rewards["pickscore"]
    assert (settings.kind, settings.device, settings.gpus) == ("pickscore", "cpu", 0)
    scorer = build_scorer(settings)
    scorer.self_test()
    assert config.held_out_rewards == ("ocr",)


@pytest.mark.parametrize(
    ("recipe", "pipeline", "latent"),
    [
        ("wan21-14b-i2v-videoalign", "WanImageToVideoPipeline", (16, 3, 4, 6)),
        ("cosmos25-2b-videoalign", "Cosmos2_5_PredictBasePipeline", (16, 3, 4, 8)),
        ("cosmos25-14b-videoalign", "Cosmos2_5_PredictBasePipeline", (16, 3, 4, 8)),
    ],
)
def test_a_video_recipe_becomes_one_that_two_cores_run(recipe: str, pipeline: str, latent: tuple[int, ...]) -> None:
    """Its own pipeline, a few frames at its own rate, a folder of clips of every split, and a VideoAlign that loads."""
    made = tiny_config(RECIPES / f"{recipe}.yaml", [])
    config, full = made.config, load_config(RECIPES / f"{recipe}.yaml")
    check_files(config)
    assert json.loads((Path(config.model.path) / "model_index.json").read_text())["_class_name"] == pipeline
    assert (config.sampler.frames, config.sampler.fps, config.model.revision) == (9, full.sampler.fps, None)
    assert config.model.model_copy(update={"path": full.model.path, "revision": full.model.revision}) == full.model
    assert load_codec(Path(config.model.path)).latent_shape(config.sampler.height, config.sampler.width, 9) == latent
    anchors = FolderSource(str(config.data.path)).examples
    counts = {split: sum(example.split == split for example in anchors) for split in ANCHORS}
    assert (config.data.kind, counts) == ("folder", ANCHORS)
    clip = anchors[0].pixels(config.sampler.height, config.sampler.width)
    assert clip.shape == (9, config.sampler.height, config.sampler.width, 3)
    assert np.abs(clip[1:].astype(int) - clip[:-1]).max() > 100  # something moves
    assert tiny_config(RECIPES / f"{recipe}.yaml", []) == made
    assert f"draw noise of {config.sampler.height} x {config.sampler.width} pixels in 9 frames" in made.table()[-1]


def test_samples_of_a_tiny_video_policy_are_its_anchors() -> None:
    config = tiny_config(RECIPES / "wan21-1.3b-videoalign.yaml", []).config
    check_files(config)
    assert json.loads((Path(config.model.path) / "model_index.json").read_text())["_class_name"] == "WanPipeline"
    manifest = read_manifest(PreparedSource(str(config.data.path)).folder)
    assert (manifest.latent, manifest.frames, manifest.splits) == ((16, 3, 4, 6), 9, ANCHORS)


def test_videoalign_gets_a_tiny_one() -> None:
    settings = tiny_config(RECIPES / "wan21-1.3b-videoalign.yaml", ["rewards={videoalign.vq+mq: {}}"], data=False).config.fleet.rewards["videoalign"]
    assert (settings.kind, settings.device, settings.gpus) == ("videoalign", "cpu", 0)
    scorer = build_scorer(settings)
    scorer.self_test()
    frames = np.random.default_rng(0).integers(0, 256, (9, 32, 48, 3), np.uint8)
    first, second = scorer.score(["a cat", "a dog that sleeps"], [Media(frames, 16.0), Media(frames, 16.0)])
    assert isinstance(first, ItemScore)
    assert isinstance(second, ItemScore)
    assert first.sub_scores["vq"] == pytest.approx(second.sub_scores["vq"], abs=1e-4)
    assert first.sub_scores["ta"] != pytest.approx(second.sub_scores["ta"], abs=1e-4)


def test_a_folder_that_is_here_is_kept(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text((RECIPES / "cosmos25-2b-videoalign.yaml").read_text().replace("path: clips", f"path: {tmp_path}"))
    assert tiny_config(recipe, []).config.data.path == str(tmp_path)
    (tmp_path / "pictures.yaml").write_text("data: {kind: folder, path: no-pictures}\nsampler: {height: 64, width: 64}\n")
    drawn = FolderSource(str(tiny_config(tmp_path / "pictures.yaml", []).config.data.path)).examples
    assert drawn[0].pixels(32, 32).shape == (32, 32, 3)


def test_layouts_without_a_tiny_one_are_told(tmp_path: Path) -> None:
    wan = {"transformer": {"_class_name": "WanTransformer3DModel", "in_channels": 36, "out_channels": 16}, "vae": {}}
    with pytest.raises(ValueError, match="takes a picture and has no CLIP features"):
        registry.TINY["UMT5EncoderModel"](tmp_path, wan)
    for name in ("UMT5EncoderModel", "Qwen2_5_VLForConditionalGeneration"):
        with pytest.raises(ValueError, match="no vae/"):
            registry.TINY[name](tmp_path, {"transformer": {}})


def test_what_cannot_be_made_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SD35.read_text().replace("stabilityai/stable-diffusion-3.5-medium", "team/unknown"))
    with pytest.raises(ConfigError, match=r"model\.path: team/unknown is neither a folder nor a published policy"):
        tiny_config(recipe, [])
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match=r"--tiny writes to .*, and cannot: Not a directory; set XDG_CACHE_HOME"):
        tiny_config(SD35, [])


def test_the_commands_take_it(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["config", str(SD35), "--tiny"])
    assert shown.exit_code == 0, shown.output
    assert "#   sampler.height                512 → 32" in shown.stdout.splitlines()
    (tmp_path / "again.yaml").write_text(shown.stdout)
    assert load_config(tmp_path / "again.yaml") == tiny_config(SD35, []).config
    planned = CliRunner().invoke(app, ["plan", str(SD35), "--tiny", "--gpus", "0"])
    assert planned.exit_code == 0, planned.output
    assert planned.stdout.startswith("tiny: sizes and weights are swapped")
    (tmp_path / "prompts.txt").write_text('a sign "407"\n')
    drawn = CliRunner().invoke(app, ["sample", str(SD35), "--tiny", "--prompts", str(tmp_path / "prompts.txt"), "--out", str(tmp_path / "drawn")])
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "drawn" / "0000.png").exists()
    refused = CliRunner().invoke(app, ["sample", str(tmp_path), "--tiny", "--prompts", str(tmp_path / "prompts.txt")])
    assert (refused.exit_code, "--tiny is for a recipe" in refused.stderr) == (2, True)


def test_anchors_of_a_video_policy_are_clips(tmp_path: Path) -> None:
    write_wan(tmp_path / "wan")
    size = ["sampler.height=32", "sampler.width=32", "sampler.frames=9"]
    changed = [f"model.path={tmp_path / 'wan'}", "data.kind=prepared", "data.path=nowhere", *size, "prompts.kind=ocr_scenes"]

    def anchors(*overrides: str) -> Path:
        full = tmp_path / "full.yaml"
        full.write_text(yaml.safe_dump(load_config(RECIPES / "glyph-ocr.yaml", [*changed, *overrides]).model_dump(mode="json")))
        return Path(str(tiny_config(full, []).config.data.path))

    found = read_manifest(anchors())
    assert (found.latent, found.frames, found.fps) == ((16, 3, 4, 4), 9, 16.0)
    assert anchors() == anchors()
    assert anchors("sampler.fps=8") != anchors()
