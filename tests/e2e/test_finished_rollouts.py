"""Whole runs with losses on finished rollouts: a learner rank dies, a run is stopped and goes on; the old policy comes back with the checkpoint."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest

from tests.e2e.test_run import check_finished
from tests.pipeline import Run, records, settings

RECIPE = "recipes/glyph-ocr-nft.yaml"
OLD = settings("objective.old_decay_rate=0.2")  # far enough behind in a few updates to be seen


def check_learnt(run: Run, updates: int) -> None:
    check_finished(run.folder, updates)
    lines: list[dict[str, Any]] = records(run.folder, "update")
    assert [line["step"] for line in lines] == list(range(1, updates + 1))
    assert all(line["grad_norm"] > 0 and line["data_loss"] > 0 for line in lines)
    assert lines[0]["old_kl"] == 0
    assert all(line["old_kl"] > 0 for line in lines[1:])
    assert not {"ratio_deviation", "clip_fraction"} & lines[0].keys()
    assert records(run.folder, "self_test") == []  # there are no densities


@pytest.mark.long
def test_nft_with_the_data_term_survives_a_dead_learner_rank(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "updates=6", *OLD, recipe=RECIPE)
    run.wait_for(lambda: run.updates() >= 3, "an update after the first checkpoint")
    run.kill("ray::RayTrainWorker")
    run.succeed()
    assert run.leftovers() == []
    check_learnt(run, 6)


@pytest.mark.long
def test_awm_with_the_data_term_is_stopped_and_goes_on(start: Callable[..., Run]) -> None:
    awm = settings("objective.preset=awm", "objective.data_weight=0.1", "objective.data_per=rollout", "objective.policy_times=stratified")
    run = start("run", "--set", "checkpoint_every=100", *awm, *OLD, recipe=RECIPE)
    run.wait_for(lambda: run.updates() >= 2, "two updates")
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.finish()
    assert code == 130, (out, err)
    again = start("run", "--set", "checkpoint_every=100", *awm, *OLD, "--resume", recipe=RECIPE)
    again.succeed()
    check_learnt(again, 4)
