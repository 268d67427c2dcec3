"""A recipe and what it needs; the whole round; how it is shown."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.unit.trainer.doctor.facts import CPU_SOFTWARE, GB, H100, MACHINE, RECIPE
from trainer.doctor import judge_recipe as judge
from trainer.doctor.examine import judged
from trainer.doctor.facts import GPU, HubAnswer, PlanFacts, Recipe, Service
from trainer.doctor.finding import Finding, worst
from trainer.doctor.gpus import as_planned
from trainer.doctor.render import as_json, lines

FITS = PlanFacts("1 x H100", disk=3 * GB, hosts=5 * GB)


def test_a_recipe_whose_needs_are_met() -> None:
    findings = judge.judge(replace(RECIPE, plan=FITS, services=(Service("redis.url", "redis://host:6379/0", "redis-server 7.0.15"),)))
    assert worst(findings) == "ok"
    assert [f.found for f in findings][2:] == ["fits 1 x H100", "redis://host:6379/0: redis-server 7.0.15"]


def test_one_that_cannot_be_read_is_one_line() -> None:
    (only,) = judge.judge(Recipe("recipe.yaml", error="unknown key 'updtes'; did you mean 'updates'?"))
    assert (only.level, only.found) == ("problem", "unknown key 'updtes'; did you mean 'updates'?")


@pytest.mark.parametrize(
    ("changed", "check", "level", "found"),
    [
        (replace(RECIPE, files_error="model.path: no such folder"), "recipe files", "problem", "model.path: no such folder"),
        (replace(RECIPE, hub="team/policy"), "recipe files", "warning", "team/policy is not in the hub's cache: a run downloads it first"),
        (replace(RECIPE, hub="team/policy", access=HubAnswer(error="it is gated")), "recipe files", "problem", "it is gated"),
        (replace(RECIPE, lacking={"wandb": "wandb"}), "package wandb", "problem", "not installed, and the recipe needs it"),
        (replace(RECIPE, plan_error="sampler: 500x512"), "plan", "problem", "sampler: 500x512"),
        (replace(RECIPE, plan=replace(FITS, errors=("too large", "too many"))), "plan", "problem", "does not fit 1 x H100: too large (and 1 more)"),
        (replace(RECIPE, services=(Service("fleet.url", "http://host", error="no answer"),)), "fleet.url", "problem", "no answer"),
    ],
)
def test_needs_that_are_not_met(changed: Recipe, check: str, level: str, found: str) -> None:
    (finding,) = [f for f in judge.judge(changed) if f.level != "ok"]
    assert (finding.check, finding.level, finding.found) == (check, level, found)
    assert finding.advice


def test_a_cluster_that_is_joined_has_gpus_of_its_own() -> None:
    (plan,) = judge.plan(replace(RECIPE, plan=PlanFacts("")))
    assert plan.level == "ok"
    assert "whose GPUs are not looked at" in plan.found


def test_a_policy_that_is_not_here_yet_cannot_be_planned() -> None:
    (plan,) = judge.plan(replace(RECIPE, hub="team/policy", plan_error="team/policy is neither a folder nor a published policy"))
    assert (plan.level, plan.found) == ("warning", "not made: team/policy is neither a folder nor a published policy")
    assert plan.advice == "download team/policy first"


def test_the_nearest_change_is_named() -> None:
    (plan,) = judge.plan(replace(RECIPE, plan=replace(FITS, errors=("too large",), nearest="activation checkpointing (learner.recompute=true)")))
    assert plan.advice.startswith("nearest change: activation checkpointing (learner.recompute=true)")


def test_the_round_weighs_the_machine_with_what_the_recipe_takes() -> None:
    small, large = (replace(RECIPE, plan=replace(FITS, hosts=hosts * GB)) for hosts in (5, 50))
    assert worst(judged(CPU_SOFTWARE, MACHINE, small)) == "ok"
    (memory,) = [f for f in judged(CPU_SOFTWARE, MACHINE, large) if f.level == "problem"]
    assert memory.check == "memory"
    assert {f.check for f in judged(CPU_SOFTWARE, MACHINE)} < {f.check for f in judged(CPU_SOFTWARE, MACHINE, small)}


def test_lines_and_json_say_the_same() -> None:
    findings = [
        Finding("python", "ok", "3.11.7"),
        Finding("open files", "warning", "1024", "ulimit -n 8192"),
        Finding("torch", "problem", "gone", "install"),
    ]
    assert lines(findings) == [
        "ok       python      3.11.7",
        "warning  open files  1024",
        "                     do: ulimit -n 8192",
        "PROBLEM  torch       gone",
        "                     do: install",
        "1 ok, 1 warning, 1 problem",
    ]
    assert [Finding(**each) for each in json.loads(as_json(findings))] == findings


def test_the_level_of_several_findings_is_their_worst() -> None:
    assert worst([]) == "ok"
    assert worst([Finding("a", "warning", ""), Finding("b", "ok", "")]) == "warning"


def test_gpus_as_the_plan_knows_them() -> None:
    """Memory is the machine's own; rates are of the table."""
    kind = as_planned([H100, replace(H100, memory=70 << 30)])
    assert (kind.name, kind.memory, kind.bf16) == (H100.name, float(70 << 30), 989e12)
    assert as_planned([GPU("NVIDIA GeForce RTX 4090", 24 << 30, (8, 9))]).bf16 == 165e12
    unknown = as_planned([GPU("NVIDIA B300", 288 << 30, (10, 3))])
    assert (unknown.name, unknown.memory) == ("NVIDIA B300", float(288 << 30))
