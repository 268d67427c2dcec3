"""Which numbers of a metrics line become TensorBoard scalars."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from trainer.run.errors import RunFailed
from trainer.run.scalars import Wandb, scalars


def test_an_update_line() -> None:
    record = {"kind": "update", "step": 3, "time": 1.0, "loss": 0.5, "skipped": 0, "seconds": {"train": 2.0, "note": "x"}, "reason": None}
    assert dict(scalars(record)) == {"update/loss": 0.5, "update/skipped": 0.0, "update/seconds/train": 2.0}


def test_evaluations_are_kept_apart_by_split_and_weights() -> None:
    record = {"kind": "eval", "split": "test", "weights": "ema", "step": 0, "prompts": 512, "reward": 0.25, "exact_match": None, "scene": {"brightness": 0.4}}
    assert dict(scalars(record)) == {"test/ema/reward": 0.25, "test/ema/scene/brightness": 0.4}


def test_wandb_says_what_to_install_when_it_is_missing(tmp_path: Path) -> None:
    if importlib.util.find_spec("wandb") is not None:
        pytest.skip("wandb is installed; the test below runs instead")
    with pytest.raises(RunFailed, match=r"wandb: .*ddrl\[wandb\]"):
        Wandb("project", "run", {}, tmp_path)


def test_wandb_keeps_every_record_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the wandb extra is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    with Wandb("project", "run", {"seed": 0}, tmp_path) as run:
        run.add({"kind": "update", "step": 1, "reward_mean": 0.5})
    assert list(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
