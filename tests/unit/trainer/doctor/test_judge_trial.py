"""What the doctor makes of a trial's facts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.doctor.facts import Trial
from trainer.doctor.finding import Finding
from trainer.doctor.judge_trial import judge
from trainer.doctor.trying import gather_trial

GOOD = Trial(
    scorers=("ocr",),
    means=(0.4, 0.5, 0.3),
    spreads=(0.2, 0.3, 0.1),
    top=0.1,
    deviation=1e-6,
    limit=1e-4,
    policy_gradient=0.01,
    data_gradient=0.002,
    cosine=-0.1,
    rewards=(0.4, 0.42, 0.41, 0.43),
    reward_error=0.05,
    prompt="a sign",
    loss_before=0.1,
    loss_after=0.101,
)


def found(**changes: Any) -> dict[str, Finding]:
    return {f.check.removeprefix("trial: "): f for f in judge(replace(GOOD, **changes))}


def test_a_good_trial_has_nothing_to_do() -> None:
    told = found()
    assert set(told) == {"reward", "reward spread", "log-probability", "gradients", "updates"}
    assert all((f.level, f.advice) == ("ok", "") for f in told.values())


@pytest.mark.parametrize(
    ("changes", "check", "level", "said", "advice"),
    [
        ({"spreads": (0.0, 0.0, 0.0)}, "reward spread", "problem", "no reward varies inside any of 3 groups", "is it constant"),
        ({"spreads": (0.0, 0.0, 0.1)}, "reward spread", "warning", "none in 2 of 3 groups", "rollout.group_size"),
        ({"top": 0.9}, "reward spread", "warning", "90% of the members are at the top already", "harder prompts"),
        ({"missing": 0.3}, "scores", "warning", "30% of the scores are missing", "ddrl score"),
        ({"deviation": 2e-3}, "log-probability", "problem", "up to 2.0e-03", "objective.old_log_prob=learner"),
        ({"policy_gradient": 0.0}, "gradients", "problem", "no gradient", "spread above"),
        ({"data_gradient": 1.0}, "gradients", "warning", "drowns the reward", "lower objective.data_weight"),
        ({"data_gradient": 1e-5}, "gradients", "warning", "holds nothing", "raise objective.data_weight"),
        ({"loss_after": 0.2}, "updates", "problem", "diffusion loss +100.0%: the policy breaks", "optimizer.lr is too high"),
        ({"rewards": (0.5, 0.5, 0.0, 0.0)}, "updates", "problem", "0.5 -> 0", "optimizer.lr is too high"),
        ({"stage": "log-probability", "error": "PayloadError: another time grid"}, "log-probability", "problem", "another time grid", "one scheduler"),
    ],
)
def test_what_is_wrong_is_named_with_its_remedy(changes: dict[str, Any], check: str, level: str, said: str, advice: str) -> None:
    told = found(**changes)[check]
    assert told.level == level
    assert said in told.found
    assert advice in told.advice


def test_a_fall_within_chance_is_no_fall() -> None:
    assert found(rewards=(0.45, 0.4, 0.38, 0.4))["updates"].level == "ok"


def test_without_a_data_term_or_densities_nothing_is_said_of_them() -> None:
    told = found(data_gradient=None, cosine=None, loss_before=None, loss_after=None, deviation=None, limit=None)
    assert told["gradients"].found == "policy term 0.01; no data term"
    assert "log-probability" not in told
    assert "diffusion loss" not in told["updates"].found


CONFIG = parse_config({})


@pytest.mark.parametrize(
    ("config", "against", "why"),
    [
        (parse_config({"objective": {"preset": "sft"}}), [], "without rollouts there is nothing to try"),
        (parse_config({"learner": {"gpus": 1.0}}), [], "the recipe asks for GPUs"),
        (CONFIG, [Finding("plan", "problem", "does not fit")], "plan comes first"),
    ],
)
def test_a_trial_that_makes_no_sense_is_left_out_with_the_reason(config: RunConfig, against: list[Finding], why: str) -> None:
    (told,) = judge(gather_trial(config, 0, against, command=["false"]))
    assert told.level == "ok"
    assert why in told.found


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["sh", "-c", "echo 'Killed: out of memory' >&2; exit 137"], "status 137: Killed: out of memory"),
        (["sleep", "60"], "not done after"),
        (["echo", "hello"], "status 0"),
    ],
)
def test_a_trial_that_dies_or_hangs_costs_the_doctor_its_lines(command: list[str], said: str) -> None:
    (told,) = judge(gather_trial(CONFIG, 0, [], deadline_s=0.5 if command[0] == "sleep" else 20, command=command))
    assert told.level == "problem"
    assert said in told.found


def test_facts_come_back_from_its_process() -> None:
    answer = '{"scorers": ["ocr"], "means": [0.5], "spreads": [0.0], "top": 1.0}'
    trial = gather_trial(CONFIG, 0, [], command=["sh", "-c", f"cat > /dev/null; echo loading; echo '{answer}'"])
    assert trial == Trial(scorers=("ocr",), means=(0.5,), spreads=(0.0,), top=1.0)
