"""The recipes for Wan and Cosmos: what they share, and what their plans say on 8, 64 and 1,024 GPUs."""

from __future__ import annotations

from pathlib import Path

import pytest

from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.gpus import GPUS
from trainer.plan.memory import Process
from trainer.plan.planner import Plan, make_plan

RECIPES = Path(__file__).resolve().parents[4] / "recipes"
SISTERS = ("wan21-1.3b-videoalign", "wan21-14b-i2v-videoalign", "cosmos25-2b-videoalign", "cosmos25-14b-videoalign")
COUNTERPARTS = {"-flow-grpo": "flow_grpo", "-dance-grpo": "dance_grpo"}
EIGHT = tuple(f"{sister}{kind}" for sister in SISTERS[1:] for kind in ("", *COUNTERPARTS))
"""Those made for eight GPUs; the small Wan is made for one."""
SCALED = {
    8: (),
    64: ("learner.ranks=32", "rollout.generators=30", "encoder.actors=2"),
    1024: ("learner.ranks=512", "learner.sequence_ranks=4", "rollout.generators=32", "encoder.actors=4"),
}


def recipe(name: str, *overrides: str) -> RunConfig:
    return load_config(RECIPES / f"{name}.yaml", list(overrides))


def planned(name: str, count: int, *overrides: str) -> Plan:
    return make_plan(recipe(name, *overrides), GPUS["h100-80"], count, Assumptions())


def process(plan: Plan, name: str) -> Process:
    return next(p for p in plan.processes if p.name == name)


def test_every_recipe_with_videoalign_is_looked_at() -> None:
    assert {p.stem for p in RECIPES.glob("*videoalign*.yaml")} == {f"{sister}{kind}" for sister in SISTERS for kind in ("", *COUNTERPARTS)}


@pytest.mark.parametrize("sister", SISTERS)
def test_counterparts_are_of_the_same_task(sister: str) -> None:
    ours = recipe(sister)
    assert (ours.name, ours.objective.preset, ours.uses_data) == (sister, "ddrl_cosmos" if sister.startswith("cosmos") else "ddrl", True)
    assert ours.rewards["videoalign"].clip == (-5, 5)
    for kind, preset in COUNTERPARTS.items():
        theirs = recipe(sister + kind)
        assert (theirs.name, theirs.objective.preset, theirs.uses_data) == (sister + kind, preset, False)
        assert (theirs.objective.kl_weight > 0) == (preset == "flow_grpo")
        for key in ("path", "revision", "dtype", "grid", "given_time"):
            assert getattr(theirs.model, key) == getattr(ours.model, key)
        for key in ("frames", "height", "width", "fps", "eval_steps", "given_frames"):
            assert getattr(theirs.sampler, key) == getattr(ours.sampler, key)
        for key in ("rewards", "held_out_rewards", "prompts", "fleet", "evaluation"):
            assert getattr(theirs, key) == getattr(ours, key)
        assert (theirs.data.kind, theirs.data.path) == (ours.data.kind, ours.data.path)
        rollouts = [config.rollout.groups_per_step * config.rollout.group_size for config in (ours, theirs)]
        assert rollouts[0] == rollouts[1]


def test_the_public_settings_of_ddrl() -> None:
    """cosmos-rl's recipe for the 2B; what differs stands in the head of ours."""
    c = recipe("cosmos25-2b-videoalign")
    assert (c.sampler.frames, c.sampler.height, c.sampler.width) == (93, 704, 1280)
    assert (c.rollout.groups_per_step, c.rollout.group_size) == (16, 8)
    assert (c.sampler.kernel, c.sampler.steps - 1, c.sampler.trained_steps) == ("edm_2ab", 20, list(range(0, 20, 2)))
    assert (c.objective.data_weight, c.objective.data_noise, c.objective.log_prob, c.objective.clip) == (0.01, "shared", "unscaled", 1e-4)
    assert (c.objective.data_per, c.objective.data_weighting, c.objective.failed_reward) == ("transition", "cosmos", "fill_mean")
    assert (c.optimizer.lr, c.optimizer.betas, c.optimizer.warmup, c.model.lora.rank) == (1e-5, (0.9, 0.99), 50, 0)
    assert (c.data.pairing, c.data.caption_dropout, c.sampler.guidance, c.sampler.given_choices) == ("own", 0.2, 1, (0, 1))


@pytest.mark.parametrize("name", EIGHT)
def test_plans_of_8_64_and_1024_gpus(name: str) -> None:
    plans = {count: planned(name, count, *keys) for count, keys in SCALED.items()}
    for count, plan in plans.items():
        assert plan.fits, (count, plan.findings)
        told = {f.kind: f.message for f in plan.findings if f.level == "warning"}
        assert not told.keys() - {"host", "idle"}
        assert ("idle" in told) == (count == 1024)
        assert count < 1024 or "keep no more than so many ranks with rows of their own" in told["idle"]
        judge = process(plan, "reward videoalign")
        assert not judge.reserved
        assert 5e9 < judge.total < 10e9
    hours = [plan.work.hours for plan in plans.values()]
    assert hours == sorted(hours, reverse=True)
    assert hours[0] > 6 * hours[1]


@pytest.mark.parametrize("name", [n for n in EIGHT if "14b" in n])
def test_14b_is_sharded_over_the_ranks(name: str) -> None:
    """Frozen weights of 14 or 16 billion in bf16: whole in a generator, a part in each rank."""
    plan, many = planned(name, 8), planned(name, 64, *SCALED[64])
    parts = [next(p.bytes for p in process(p, "learner rank").parts if p.name == "weights") for p in (plan, many)]
    whole = next(p.bytes for p in process(plan, "generator").parts if p.name == "weights")
    assert 28e9 < whole < 34e9
    assert parts == pytest.approx([whole / 4, whole / 32])


@pytest.mark.parametrize("name", ["wan21-14b-i2v-videoalign", "cosmos25-14b-videoalign"])
def test_all_weights_of_14b_do_not_fit_and_an_adapter_is_proposed(name: str) -> None:
    full = planned(name, 8, "model.lora.rank=0", "model.base_dtype=float32")
    assert not full.fits
    assert full.nearest is not None
    assert "model.lora.rank=32" in full.nearest.keys


@pytest.mark.parametrize("kind", ["", *COUNTERPARTS])
def test_the_small_wan_on_one_gpu_and_at_its_own_size(kind: str) -> None:
    name = f"wan21-1.3b-videoalign{kind}"
    one = planned(name, 1)
    assert one.fits
    assert one.placement.most < 48e9
    large = [line for line in (RECIPES / "wan21-1.3b-videoalign.yaml").read_text().splitlines() if line.startswith("#   --set")]
    keys = " ".join(large).replace("#", "").replace("--set", "").split()
    wide = planned(name, 8, *keys)
    assert wide.fits
    assert wide.shape == (16, 21, 60, 104)
