"""Every recipe of the repository: `ddrl config` and `ddrl plan` take it, as it is and tiny."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from huggingface_hub import constants
from typer.testing import CliRunner

from actors.clips import write_clip
from actors.prepared import Row, begin, finish, write_shard
from actors.sources.example import split_of
from trainer.cli.main import app
from trainer.config.load import load_config, parse_config
from trainer.config.run import RunConfig

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
def anchors(_elsewhere: Path) -> Callable[[RunConfig], Path]:
    """A prepared set of a recipe's size with an example of every split."""
    return lambda config: prepared(_elsewhere, config)


def prepared(root: Path, config: RunConfig) -> Path:
    s, named = config.sampler, dict[str, str]()
    folder = root / f"anchors-{s.frames}x{s.height}x{s.width}"
    if folder.exists():
        return folder
    for i in range(200):
        named.setdefault(split_of(f"{i}"), f"{i}")
    rows, clips, frames = [Row(name, f'a sign that says "{name}"', name, s.width, s.height) for name in named.values()], s.frames > 1, s.frames // 4 + 1
    latent = (16, *((frames,) if clips else ()), s.height // 8, s.width // 8)
    begin(folder, {"format": 1})
    write_shard(folder, 0, np.zeros((len(rows), *latent), np.float32), rows, [], np.zeros((len(rows), s.height, s.width, 3), np.uint8) if clips else None)
    about = {"frames": s.frames, "fps": s.fps} if clips else {}
    finish(folder, 1, [], codec="another's", model="elsewhere", height=s.height, width=s.width, latent=latent, **about)
    return folder


@pytest.fixture(scope="module")
def clips(_elsewhere: Path) -> Path:
    """A folder of captioned clips, as long as the recipes want them: one file under many captions."""
    folder = _elsewhere / "clips"
    folder.mkdir()
    write_clip(folder / "a.mp4", np.zeros((93, 16, 16, 3), np.uint8), 16.0)
    (folder / "metadata.jsonl").write_text("".join(json.dumps({"file_name": "a.mp4", "text": f"a clip, number {i}"}) + "\n" for i in range(1500)))
    return folder


@recipes
def test_config_takes_it(recipe: Path, anchors: Callable[[RunConfig], Path], clips: Path) -> None:
    config = load_config(recipe)
    given = {"prepared": (anchors, "is no prepared set"), "folder": (lambda _: clips, "needs a metadata.jsonl")}.get(config.data.kind)
    if given is not None:  # what the recipe says to bring or to draw beforehand is asked for by name
        refused = CliRunner().invoke(app, ["config", str(recipe)])
        assert (refused.exit_code, refused.stderr.count("\n")) == (2, 1)
        assert f"{config.data.path} {given[1]}" in refused.stderr
    there = [] if given is None else [f"data.path={given[0](config)}"]
    if config.data.kind == "folder":
        there += ["sampler.height=64", "sampler.width=112"]  # some clips are read, in the run's size
    done = CliRunner().invoke(app, ["config", str(recipe), *(w for s in there for w in ("--set", s))])
    assert done.exit_code == 0, done.output
    assert parse_config(yaml.safe_load(done.stdout)) == load_config(recipe, there)


@recipes
def test_plan_takes_it(recipe: Path) -> None:
    learner = load_config(recipe).learner
    gpus = "8" if learner.gpus == 1 else "1" if learner.gpus else "0"
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
