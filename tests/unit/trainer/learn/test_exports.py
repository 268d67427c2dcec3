"""Exports in the background: what fails is told, what takes too long is not waited for. The rest is in `test_ranks.py`."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.learn.exports
from diffusion.config import ModelConfig
from trainer.learn.exports import Exports


class Gathered:
    """What an export needs of a learner on a group's only rank: its state."""

    def __init__(self) -> None:
        self.ema: dict[str, torch.Tensor] = {}

    def full_state(self, ema: bool = False, keep: bool = True, frozen: bool = True) -> dict[str, torch.Tensor]:
        return {"w": torch.ones(2)} if keep else {}


def exports_of(policy_folder: Path, tmp_path: Path, rank: int = 0) -> Exports:
    return Exports(tmp_path / "exports", ModelConfig(path=str(policy_folder)), rank)


def test_an_export_that_fails_ends_the_loop(policy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "exports").write_text("in the way")
    exports = exports_of(policy_folder, tmp_path)
    learner: Any = Gathered()
    exports.take(learner, 1)
    with pytest.raises(OSError, match="exports"):
        exports.finish()
    with pytest.raises(OSError, match="exports"):  # and so does the next checkpoint
        exports.take(learner, 2)


def test_an_export_that_does_not_end_is_given_up(policy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    monkeypatch.setattr(trainer.learn.exports, "save_policy", lambda *_: free.wait(60))
    exports = exports_of(policy_folder, tmp_path)
    learner: Any = Gathered()
    exports.take(learner, 1)
    with pytest.raises(TimeoutError, match="took longer than 0 s; is the run folder's file system slow or full"):
        exports.finish(0.05)
    free.set()
    exports.finish()


def test_the_newest_two_are_kept_and_other_ranks_write_none(policy_folder: Path, tmp_path: Path) -> None:
    exports = exports_of(policy_folder, tmp_path)
    learner: Any = Gathered()
    for step in (1, 2, 10):
        exports.take(learner, step)
        exports.finish()
    other = exports_of(policy_folder, tmp_path, rank=1)
    other.take(learner, 11)
    other.finish()
    assert sorted(f.name for f in (tmp_path / "exports").iterdir()) == ["step-000002", "step-000010"]
