"""Every recipe of the repository: `ddrl config` and `ddrl plan` take it, as it is and tiny."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from actors.prepared import Row, begin, finish, write_shard
from actors.sources.example import split_of
from trainer.cli.main import app
from trainer.config.load import load_config, parse_config

ROOT = Path(__file__).resolve().parents[4]
RUNS = sorted((p for p in (ROOT / "recipes").glob("*.yaml") if p.stem != "rewards"), key=lambda p: p.stem)
"""`rewards.yaml` is of `ddrl serve`."""
recipes = pytest.mark.parametrize("recipe", RUNS, ids=lambda p: p.stem)


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """From the root, with caches of their own and without the hub; yields a set as `ddrl presample` would have made for the recipes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path_factory.mktemp("hub")))
        patch.setattr(constants, "HF_HUB_OFFLINE", True)
        yield tmp_path_factory.mktemp("sets")


@pytest.fixture(scope="module")
def anchors(_elsewhere: Path) -> Path:
    """A prepared set of the recipes' size with an example of every split."""
    folder, named = _elsewhere / "ocr-anchors", {}
    for i in range(200):
        named.setdefault(split_of(f"{i}"), f"{i}")
    begin(folder, {"format": 1})
    rows = [Row(name, f'a sign that says "{name}"', name, 512, 512) for name in named.values()]
    write_shard(folder, 0, np.zeros((len(rows), 16, 64, 64), np.float32), rows, [])
    finish(folder, 1, [], codec="another's", model="elsewhere", height=512, width=512, latent=(16, 64, 64))
    return folder


@recipes
def test_config_takes_it(recipe: Path, anchors: Path) -> None:
    config = load_config(recipe)
    drawn = config.data.kind == "prepared"
    if drawn:  # what the recipe says to draw beforehand is asked for by name
        refused = CliRunner().invoke(app, ["config", str(recipe)])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert f"data: {config.data.path} is no prepared set" in refused.stderr
    there = [f"data.path={anchors}"] if drawn else []
    done = CliRunner().invoke(app, ["config", str(recipe), *(w for s in there for w in ("--set", s))])
    assert done.exit_code == 0, done.output
    assert parse_config(yaml.safe_load(done.stdout)) == load_config(recipe, there)


@recipes
def test_plan_takes_it(recipe: Path) -> None:
    gpus = "1" if load_config(recipe).learner.gpus else "0"
    done = CliRunner().invoke(app, ["plan", str(recipe), "--gpus", gpus])
    assert done.exit_code == 0, done.output
    assert done.stdout.splitlines()[-1].strip() == "fits"


@recipes
def test_both_take_it_tiny(recipe: Path) -> None:
    shown = CliRunner().invoke(app, ["config", str(recipe), "--tiny"])
    assert shown.exit_code == 0, shown.output
    tiny = parse_config(yaml.safe_load(shown.stdout))
    assert tiny.updates <= 4
    assert (tiny.objective, tiny.rewards, tiny.data.kind) == ((full := load_config(recipe)).objective, full.rewards, full.data.kind)
    planned = CliRunner().invoke(app, ["plan", str(recipe), "--tiny", "--gpus", "0"])
    assert planned.exit_code == 0, planned.output


@recipes
def test_its_comments_fit_the_page(recipe: Path) -> None:
    assert max(map(len, recipe.read_text().splitlines())) <= 175
