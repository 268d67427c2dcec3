"""Which numbers of a metrics line become TensorBoard scalars."""

from __future__ import annotations

from trainer.scalars import scalars


def test_an_update_line() -> None:
    record = {"kind": "update", "step": 3, "time": 1.0, "loss": 0.5, "skipped": 0, "seconds": {"train": 2.0, "note": "x"}, "reason": None}
    assert dict(scalars(record)) == {"update/loss": 0.5, "update/skipped": 0.0, "update/seconds/train": 2.0}


def test_evaluations_are_kept_apart_by_split_and_weights() -> None:
    record = {"kind": "eval", "split": "test", "weights": "ema", "step": 0, "prompts": 512, "reward": 0.25, "exact_match": None, "scene": {"brightness": 0.4}}
    assert dict(scalars(record)) == {"test/ema/reward": 0.25, "test/ema/scene/brightness": 0.4}
