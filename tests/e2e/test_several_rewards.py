"""Runs of several rewards: an own class beside a built-in one, one that is held out, one that a service elsewhere has."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from zlib import crc32

import pytest
import yaml

from tests.e2e.test_run_over_rest import service  # noqa: F401  # a fixture
from tests.pipeline import ROOT, Run, check_ledger, records

DARKNESS = """
from services.contract import ItemScore
from services.scorers.base import Scorer


class Darkness(Scorer):
    name = "darkness"
    media = ("image",)
    reward = "darkness"
    sub_scores = ("darkness", "blueness")

    revision = "darkness-1"
    preprocessing = "none"

    def __init__(self, settings):
        self.settings = settings

    def score(self, prompts, media):
        means = [item.pixels.mean((0, 1)) / 255 for item in media]
        return [ItemScore(1 - float(m.mean()), {"darkness": 1 - float(m.mean()), "blueness": float(m[2])}) for m in means]

    def self_test(self):
        pass
"""


def recipe(folder: Path, **changes: object) -> Path:
    """The demo's recipe with other rewards, beside a module of one's own."""
    (folder / "night.py").write_text(DARKNESS)
    tree = yaml.safe_load((ROOT / "recipes" / "glyph-ocr.yaml").read_text()) | changes
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(tree))
    return file


def path_to(folder: Path) -> dict[str, str]:
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}


@pytest.mark.long
def test_two_rewards_of_which_one_is_an_own_class_and_a_third_held_out(start: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)  # reading the run's settings loads its classes
    rewards = {"ocr": {"weight": 1.0}, "darkness.blueness": {"weight": -0.5, "clip": [0.0, 1.0]}}
    fleet = {"rewards": {"darkness": {"kind": "night:Darkness"}}}
    run = start("run", recipe=str(recipe(tmp_path, rewards=rewards, held_out_rewards=["jpeg"], fleet=fleet)), environment=path_to(tmp_path))
    run.succeed()
    check_ledger(run.folder, 4)
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {name: reward["trained"] for name, reward in summary["rewards"].items()} == {"ocr": True, "darkness.blueness": True, "jpeg": False}
    for line in records(run.folder, "update"):
        assert line["rewards"].keys() == rewards.keys()
        assert -1 <= line["reward_mean"] - line["rewards"]["ocr"] <= 0
    report = (run.folder / "report.html").read_text()
    assert all(name in report for name in ("ocr", "darkness.blueness", "jpeg"))
    assert run.leftovers() == []


@pytest.mark.long
def test_a_held_out_reward_of_another_service_with_a_key(start: Callable[..., Run], service: tuple[str, str], tmp_path: Path) -> None:  # noqa: F811
    url, key = service
    fleet = {"rewards": {"darkness": {"kind": "night:Darkness"}, "elsewhere": {"kind": "http", "url": url, "model": "ocr", "api_key_env": "REWARD_KEY"}}}
    file = recipe(tmp_path, rewards={"darkness": {"weight": 1.0}}, held_out_rewards=["elsewhere"], fleet=fleet)
    run = start("run", recipe=str(file), environment=path_to(tmp_path) | {"REWARD_KEY": key})
    run.succeed()
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {name: reward["trained"] for name, reward in summary["rewards"].items()} == {"darkness": True, "elsewhere": False}
    assert summary["rewards"]["elsewhere"]["before"] > 0.2  # the demo's policy writes half of its signs


@pytest.mark.long
def test_a_reward_that_cannot_judge_the_prompts_is_said_before_anything_is_trained(start: Callable[..., Run], tmp_path: Path) -> None:
    words = {crc32(f"house{i}".encode()) % 64: f"house{i}" for i in range(200)}.values()  # the base's encoder tells these apart
    (tmp_path / "prompts.txt").write_text("\n".join(f"{a} {b}" for a, b in combinations(words, 2)))
    tree = {"prompts": {"kind": "file", "path": str(tmp_path / "prompts.txt")}}
    run = start("run", recipe=str(recipe(tmp_path, **tree)))
    status, out, error = run.finish()
    assert status == 2, out + error
    assert "ocr" in error
    assert "no_quoted_text" in error
    assert run.updates() == 0
