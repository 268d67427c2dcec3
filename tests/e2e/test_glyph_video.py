"""The recipes of the glyph world in motion, whole, at reduced size."""

from __future__ import annotations

import json
from collections.abc import Callable

import av
import pytest
import torch
from diffusers import CosmosTransformer3DModel

from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from tests.e2e.test_kernels import FEW, trained
from tests.pipeline import Run, records


@pytest.mark.long
@pytest.mark.parametrize(
    ("recipe", "reward", "held_out"), [("glyph-video", "ocr", "motion"), ("glyph-video-motion", "motion", "ocr"), ("glyph-video-i2v", "motion", "ocr")]
)
def test_a_run_learns_from_one_reward_and_is_seen_by_the_other(recipe: str, reward: str, held_out: str, start: Callable[..., Run]) -> None:
    run = start("run", *FEW, recipe=f"recipes/{recipe}.yaml")
    _, updates = trained(run)
    assert all(set(update["rewards"]) == {reward} and update["data_loss"] > 0 for update in updates)
    before, after = [record for record in records(run.folder, "evaluation") if record["split"] == "test"]
    assert set(before["rewards"]) == set(after["rewards"]) == {reward, held_out}
    assert before["rewards"]["motion"] > 0.2  # the base moves its numbers
    summary = json.loads((run.folder / "summary.json").read_text())
    assert {name: found["trained"] for name, found in summary["rewards"].items()} == {reward: True, held_out: False}
    with av.open(str(run.folder / "samples" / "after.mp4")) as file:
        assert (file.streams.video[0].frames, file.streams.video[0].average_rate) == (5, 8)
    (export,) = (run.folder / "exports").glob("step-*2")
    theirs = CosmosTransformer3DModel.from_pretrained(export, subfolder="transformer").state_dict()
    ours = load_policy(ModelConfig(path=str(export))).transformer.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


@pytest.mark.long
def test_generators_of_two_processes_sample_what_the_learner_finds_again(start: Callable[..., Run]) -> None:
    few = [*FEW, "--set", "rollout.generators=1", "--set", "rollout.sequence_ranks=2"]
    run = start("run", *few, recipe="recipes/glyph-video-i2v.yaml")
    _, updates = trained(run)
    assert all(update["ratio_deviation"] < 1e-3 for update in updates)


@pytest.mark.long
def test_the_control_has_no_rollouts_and_the_same_evaluations(start: Callable[..., Run]) -> None:
    run = start("run", *FEW, "--set", "data.batch_size=16", recipe="recipes/glyph-video-control.yaml")
    run.succeed()
    assert records(run.folder, "self_test") == []
    final = [record for record in records(run.folder, "evaluation") if record["split"] == "test"]
    assert [set(record["rewards"]) for record in final] == [{"ocr", "motion"}] * 2
