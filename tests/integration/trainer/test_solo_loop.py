"""The loop in one process does what the pipeline does: checked against the engine's own group and the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.pipeline import RECIPE, SMALL, samples
from trainer.config.load import load_config
from trainer.solo.loop import SoloLoop

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def loop() -> SoloLoop:
    threads = torch.get_num_threads()
    config = load_config(ROOT / RECIPE, [*SMALL, "updates=2", f"model.path={ROOT / 'recipes/glyph-base'}"])
    try:
        return SoloLoop(config, 1)
    finally:
        torch.set_num_threads(threads)


def test_updates_learn_on_groups_in_order_and_change_the_weights(loop: SoloLoop) -> None:
    before = {name: p.detach().clone() for name, p in loop.learner.model.named_parameters()}
    records = [loop.update(1), loop.update(2)]
    assert [r["trained_groups"] for r in records] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [samples(r, 4) for r in records] == [16, 16]
    assert abs(records[0]["policy_loss"]) < 1e-3  # ratios are 1: the densities are those of the weights that sampled
    assert records[0]["data_loss"] > 0
    assert any(not torch.equal(before[name], p) for name, p in loop.learner.model.named_parameters())
