"""Whole runs with samplers other than the demo's, at reduced size: what is sampled can be trained on, or the run says why not."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.test_refusals import refuse
from tests.pipeline import Run, check_ledger, records, settings

FEW = settings(
    *("updates=2", "optimizer.ema=0", "evaluation.every=0", "evaluation.test_prompts=4", "evaluation.loss_points=4"),
    *("evaluation.diversity_prompts=1", "evaluation.diversity_samples=2", "evaluation.grid_prompts=1"),
)


def trained(run: Run) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The self-test's record and the updates of a run that ended well."""
    run.succeed()
    assert run.leftovers() == []
    check_ledger(run.folder, 2)
    (tested,) = records(run.folder, "self_test")
    updates = records(run.folder, "update")
    assert json.loads((run.folder / "summary.json").read_text())["self_test_ratio_deviation"] == tested["ratio_deviation_max"]
    assert all(r["skipped"] == 0 and r["grad_norm"] > 0 for r in updates)
    return tested, updates


@pytest.mark.long
def test_the_public_ddrl_sampler(start: Callable[..., Run]) -> None:
    """Churn with the two-step solver in sigma space, anchors at the rollouts' own noise and times, unscaled log-probabilities."""
    sampler = settings("sampler.kernel=edm_2ab", "sampler.noise_level=1.0", "sampler.steps=8", "sampler.trained_steps=[0, 2, 4]")
    objective = settings("objective.log_prob=unscaled", "objective.data_noise=shared", "objective.data_per=transition", "replay.max_staleness=0")
    tested, updates = trained(start("run", *FEW, *sampler, *objective))
    assert tested["refused"] is None
    for update in updates:
        assert set(update["ratio_deviation_by_step"]) == set(update["log_prob_gap_by_step"]) == {"0", "2", "4"}
        assert update["ratio_deviation"] < 1e-4
        assert update["data_loss"] > 0


@pytest.mark.long
def test_guided_rollouts_in_bf16_with_the_learners_log_probabilities(start: Callable[..., Run]) -> None:
    sampler = settings("sampler.guidance=3.0", "sampler.kernel=ddim_eta", "sampler.noise_level=0.8", "model.dtype=bfloat16")
    tested, updates = trained(start("run", *FEW, *sampler, *settings("objective.old_log_prob=learner", "replay.max_staleness=0")))
    assert tested["ratio_deviation_max"] > tested["limit"]  # measured all the same; not a reason to refuse
    assert tested["refused"] is None
    for update in updates:
        assert update["clip_fraction"] == 0
        assert 0 <= update["ratio_deviation"] < 0.1


@pytest.mark.long
def test_a_gap_near_the_clip_is_refused(start: Callable[..., Run]) -> None:
    run = start("run", *FEW, *settings("model.dtype=bfloat16", "sampler.guidance=3.0", "objective.clip=1e-4"))
    refuse(run, 1, "log-probability self-test", "objective.old_log_prob=learner", "clip/10 = 1e-05")
    (tested,) = records(run.folder, "self_test")
    assert tested["ratio_deviation_max"] > 1e-5
    assert records(run.folder, "update") == []
