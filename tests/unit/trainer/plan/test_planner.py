"""What is said of a recipe beside its numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config.load import load_config, parse_config
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.gpus import GPUS
from trainer.plan.planner import Plan, make_plan

RECIPE = Path("recipes/sd35-medium-ocr.yaml")


def planned(config: RunConfig, count: int = 1, gpu: str = "h100-80", **assumed: Any) -> Plan:
    return make_plan(config, GPUS[gpu], count, Assumptions(**assumed))


def sd35(*overrides: str) -> RunConfig:
    return load_config(RECIPE, list(overrides))


def kinds(plan: Plan) -> dict[str, str]:
    return {f.kind: f.level for f in plan.findings}


def test_the_recipe_fits_one_gpu() -> None:
    plan = planned(sd35())
    assert plan.fits
    assert plan.changes == ()
    assert plan.components[0].trained == 18_776_064  # Flow-GRPO's 191 layers at rank 32, not the second attentions
    assert kinds(plan) == {}


def test_text_encoders_on_cpus_are_too_slow() -> None:
    found = {f.kind: f.message for f in planned(sd35("encoder.gpus=0")).findings}
    assert "encode prompts on a GPU (encoder.gpus)" in found["encoding"]


def test_evaluations_that_come_too_often_fall_behind() -> None:
    found = {f.kind: f.message for f in planned(sd35("evaluation.every=1")).findings}
    assert "of 1 generators, longer than the 1 updates between two: it falls behind; raise evaluation.every or rollout.generators" in found["evaluation"]
    found = {f.kind: f.message for f in planned(sd35("evaluation.every=1", "objective.preset=sft", "rollout.gpus=0", "rewards={}")).findings}
    assert "of 1 generators on CPUs (rollout.gpus puts them on GPUs)" in found["evaluation"]


def test_a_smaller_gpu_names_the_nearest_change() -> None:
    plan = planned(sd35(), gpu="l40s-48")
    assert kinds(plan)["memory"] == "error"
    assert not plan.fits
    assert plan.nearest is not None
    assert plan.nearest.name == "activation checkpointing"


def test_payloads_must_fit_their_store() -> None:
    plan = planned(sd35("replay.payloads=redis", "data.batch_size=null", "rollout.group_size=224", "replay.max_bytes=1099511627776"))
    assert plan.storage.group > 512 * 2**20  # more than a value of Redis holds, so it is several
    assert "payload" not in kinds(plan)
    plan = planned(sd35("checkpoint_every=1000"))
    budget = next(f for f in plan.findings if f.kind == "budget")
    assert budget.level == "error"
    wanted = int(budget.message.split("replay.max_bytes=")[1].split(",")[0])
    assert wanted >= plan.storage.retained
    assert plan.nearest is not None
    assert plan.nearest.keys == (f"replay.max_bytes={wanted}",)
    assert planned(sd35("checkpoint_every=100", f"replay.max_bytes={wanted}")).fits


def test_gpus_that_nobody_uses() -> None:
    assert kinds(planned(sd35(), count=8))["idle"] == "warning"
    assert kinds(planned(parse_config({}), count=1))["cpu"] == "warning"
    assert kinds(planned(parse_config({}), count=0)) == {"gradients": "note"}


def test_gradients_of_several_passes_are_told() -> None:
    full = "model.lora.rank=0", "model.base_dtype=float32", "learner.ranks=8", "rollout.generators=8"
    plan = planned(sd35(*full), count=8)
    assert kinds(plan)["gradients"] == "note"
    assert "sharded gradients" in [c.name for c in plan.changes]
    assert "gradients" not in kinds(planned(sd35(*full, "learner.accumulate=sharded"), count=8))


def test_what_the_learner_s_memory_options_cannot_do_is_told() -> None:
    assert kinds(planned(sd35("learner.micro_tokens=1000")))["tokens"] == "warning"
    assert "tokens" not in kinds(planned(sd35("learner.micro_tokens=2000")))
    assert kinds(planned(parse_config({"learner": {"offload": True}}), count=0))["offload"] == "note"
    assert "offload" not in kinds(planned(sd35("learner.offload=true")))


def test_the_plan_as_json() -> None:
    plan = planned(sd35(), gpu="l40s-48")
    found = json.loads(json.dumps(plan.json()))
    assert found["fits"] is False
    assert found["nearest"]["keys"] == list(plan.nearest.keys) if plan.nearest else False
    assert found["gpu"]["name"] == "l40s-48"
    assert found["processes"][0]["bytes"] == plan.processes[0].total
    assert found["assumptions"]["train_utilisation"] == 0.4
    assert found["placement"]["devices"] == [{"index": 0, "bytes": plan.placement.most, "holds": ["learner rank", "generator", "encoder"]}]
