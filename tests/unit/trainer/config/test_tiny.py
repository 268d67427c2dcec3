"""How far a recipe's numbers fall, and that nothing else changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config.load import load_config, parse_config
from trainer.config.run import RunConfig
from trainer.config.tiny import MOST, shrunk, value_at

RECIPES = Path(__file__).resolve().parents[4] / "recipes"
RUNS = sorted(p.stem for p in RECIPES.glob("*.yaml") if p.stem != "rewards")


def small(recipe: str, *overrides: str) -> tuple[RunConfig, RunConfig, dict[str, Any]]:
    """A recipe before and after, and what fell."""
    full = load_config(RECIPES / f"{recipe}.yaml", list(overrides))
    low = shrunk(full, {item.partition("=")[0] for item in overrides})
    return full, load_config(RECIPES / f"{recipe}.yaml", [f"{k}={json.dumps(v)}" for k, v in low.items()] + list(overrides)), low


@pytest.mark.parametrize("recipe", RUNS)
def test_numbers_fall_and_nothing_else_changes(recipe: str) -> None:
    full, tiny, low = small(recipe)
    before, after = full.model_dump(mode="json"), tiny.model_dump(mode="json")
    for key, value in low.items():
        was = value_at(full, key)
        if isinstance(value, int | float) and isinstance(was, int | float):
            assert value < was, key
        tree = before
        *parents, leaf = key.split(".")
        for part in parents:
            tree = tree[part]
        tree[leaf] = value
    assert after == before
    for same in ("objective", "optimizer", "rewards", "held_out_rewards", "prompts", "model"):
        assert getattr(full, same) == getattr(tiny, same)
    assert full.data.model_copy(update={"batch_size": None}) == tiny.data.model_copy(update={"batch_size": None})
    for same in ("kernel", "noise_level", "guidance", "noise_on"):
        assert getattr(full.sampler, same) == getattr(tiny.sampler, same)
    assert all(value_at(tiny, key) <= most for key, most in MOST.items())
    assert shrunk(tiny) == {}


def test_the_worked_example() -> None:
    _, tiny, _ = small("sd35-medium-ocr", "sampler.width=768")
    assert (tiny.sampler.height, tiny.sampler.width) == (32, 768)  # what the command line says stays
    full = load_config(RECIPES / "sd35-medium-ocr.yaml")
    wide = full.model_copy(update={"sampler": full.sampler.model_copy(update={"width": 768})})
    low = shrunk(wide)
    assert (low["sampler.height"], low["sampler.width"], low["sampler.steps"], low["sampler.trained_steps"]) == (32, 48, 4, [0, 1, 2])
    assert (low["rollout.gpus"], low["learner.gpus"]) == (0, 0)


def test_the_glyph_world_keeps_its_pictures() -> None:
    full, tiny, _ = small("glyph-ocr")
    assert (tiny.sampler.height, tiny.sampler.width) == (full.sampler.height, full.sampler.width) == (16, 48)
    assert (tiny.rollout.groups_per_step, tiny.rollout.group_size, tiny.learner.ranks) == (2, 4, 2)


@pytest.mark.parametrize(
    "overrides",
    [
        ("learner.ranks=3",),
        ("rollout.group_size=6", "rollout.min_group_size=5"),
        ("sampler.trained_steps=[8]",),
        ("sampler.steps=3", "sampler.trained_steps=2"),
    ],
)
def test_what_the_command_line_says_stays_and_the_rest_goes_with_it(overrides: tuple[str, ...]) -> None:
    full, tiny, low = small("sd35-medium-ocr", *overrides)
    for key in {item.partition("=")[0] for item in overrides}:
        assert value_at(tiny, key) == value_at(full, key)
    assert low["updates"] == 4


def test_the_mesh_of_ranks_falls_with_them() -> None:
    full = load_config(RECIPES / "sd35-medium-ocr.yaml")
    wide = full.model_copy(update={"learner": full.learner.model_copy(update={"ranks": 64, "replicas": 4, "sequence_ranks": 8})})
    low = shrunk(wide)
    assert (low["learner.ranks"], low["learner.replicas"], low["learner.sequence_ranks"]) == (2, 1, 2)
    shared = full.model_copy(update={"rollout": full.rollout.model_copy(update={"sequence_ranks": 8})})
    assert shrunk(shared)["rollout.sequence_ranks"] == 2
    fixed = shrunk(wide, ("learner.ranks", "learner.replicas", "learner.sequence_ranks"))
    assert not {"learner.ranks", "learner.replicas", "learner.sequence_ranks"} & fixed.keys()


def test_few_steps_of_any_kernel_have_something_to_train() -> None:
    for kernel in ("edm_2ab", "cps", "flow_sde"):
        for trained in (5, [7], [0, 7]):
            low = shrunk(parse_config({"sampler": {"kernel": kernel, "trained_steps": trained}}))
            changed = {k.removeprefix("sampler."): v for k, v in low.items() if k.startswith("sampler.")}
            parse_config({"sampler": {"kernel": kernel, "trained_steps": trained, **changed}})


def test_rewards_come_down_to_one_replica_on_a_cpu() -> None:
    reward = {"kind": "clipscore", "path": "/m", "device": "cuda", "gpus": 0.5, "replicas": {"min": 2, "max": 4}}
    low = shrunk(parse_config({"rewards": {"clipscore": {}}, "fleet": {"rewards": {"clipscore": reward}}}))
    of = {k.removeprefix("fleet.rewards.clipscore."): v for k, v in low.items() if k.startswith("fleet.")}
    assert of == {"device": "cpu", "gpus": 0.0, "replicas": {"min": 1, "max": 1}}
