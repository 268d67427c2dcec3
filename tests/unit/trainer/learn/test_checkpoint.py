"""Checkpoints in the background: what is staged is what is written, in order, one at a time, and what fails is told. On one rank; two are
in `test_ranks.py`."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray.train
import torch
import torch.distributed.checkpoint as dcp

from tests.gloo import alone
from tests.unit.trainer.learn.reports import Reports
from trainer.learn.checkpoint import CheckpointFailed, Checkpoints, Progress, remove_unregistered


class Trained:
    """What a checkpoint needs of a learner."""

    def __init__(self) -> None:
        self.decay_updates, self.asked = 10, 0
        self.weights, self.count = torch.arange(6.0), torch.tensor(1.0)
        self.options = {"lr": 0.1, "betas": (0.9, 0.99)}

    def shards(self) -> dict[str, Any]:
        self.asked += 1
        return {"model": {"w": torch.nn.Parameter(self.weights)}, "optimizer": {"state": {"step": self.count}, "groups": [self.options]}}

    def update(self) -> None:
        """In place, as an optimiser does."""
        self.weights += 1
        self.count += 1
        self.options["lr"] *= 0.5


@pytest.fixture(autouse=True)
def _group() -> Iterator[None]:
    """A process group of this rank only."""
    with alone():
        yield


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> Iterator[Reports]:
    made = Reports()
    monkeypatch.setattr(ray.train, "report", made)
    yield made
    made.gate.set()


def take(checkpoints: Checkpoints, learner: Trained, progress: Progress) -> None:
    of_learner: Any = learner
    checkpoints.take(of_learner, progress)


def weights_of(folder: Path) -> torch.Tensor:
    found = {"model": {"w": torch.zeros(6)}}
    dcp.load(found, checkpoint_id=folder)
    return found["model"]["w"]


def test_what_is_written_is_what_was_staged(tmp_path: Path, reports: Reports) -> None:
    """To the byte what ranks that wait for the disk write, though weights, optimiser and ids go on changing in place."""
    learner, progress = Trained(), Progress(step=2, epoch=3, groups=[5, 4], data=[1])
    take(Checkpoints(tmp_path / "waited", 0, background=False), learner, progress)
    assert reports.names == ["step-000002"]
    progress = Progress(step=2, epoch=3, groups=[5, 4], data=[1])
    checkpoints = Checkpoints(tmp_path / "trained", 0, background=True)
    reports.gate.clear()
    take(checkpoints, learner, progress)
    learner.update()
    learner.decay_updates = 99
    progress.step = 3
    progress.groups.append(7)
    reports.gate.set()
    checkpoints.finish()
    waited, trained = (tmp_path / name / "step-000002" for name in ("waited", "trained"))
    files = {f.name for f in waited.iterdir()}
    assert files == {f.name for f in trained.iterdir()} >= {".metadata", "__0_0.distcp", "progress.json"}
    assert all((waited / name).read_bytes() == (trained / name).read_bytes() for name in files - {".metadata"})
    assert torch.equal(weights_of(trained), torch.arange(6.0))
    assert json.loads((trained / "progress.json").read_text()) == {"step": 2, "epoch": 3, "groups": [5, 4], "data": [1], "decay_updates": 10}


def test_each_carries_what_was_claimed_since_the_one_before(tmp_path: Path, reports: Reports) -> None:
    learner, progress, checkpoints = Trained(), Progress(epoch=2), Checkpoints(tmp_path, 0, background=True)
    for step in (1, 2, 3):
        progress.step = step
        progress.groups.append(10 * step)
        take(checkpoints, learner, progress)
        assert (progress.saved, progress.groups) == (step, [])
    checkpoints.finish()
    assert [json.loads((tmp_path / name / "progress.json").read_text())["groups"] for name in reports.names] == [[10], [20], [30]]
    assert [(told["step"], told["epoch"]) for _, told in reports.registered] == [(1, 2), (2, 2), (3, 2)]


def test_updates_go_on_while_one_is_written_and_the_next_waits_for_it(tmp_path: Path, reports: Reports) -> None:
    learner, progress, checkpoints = Trained(), Progress(step=2), Checkpoints(tmp_path, 0, background=True)
    reports.gate.clear()
    take(checkpoints, learner, progress)
    for step in (3, 4):
        learner.update()
        progress.step = step
    assert reports.names == []
    following = threading.Thread(target=take, args=(checkpoints, learner, progress))
    following.start()
    following.join(0.3)
    assert following.is_alive()
    assert learner.asked == 1  # nothing more is staged: one copy at a time
    reports.gate.set()
    following.join(60)
    assert not following.is_alive()
    checkpoints.finish()
    assert [int(weights_of(tmp_path / name)[0]) for name in ("step-000002", "step-000004")] == [0, 2]


def test_one_that_fails_is_told_at_the_next_and_at_the_end(tmp_path: Path, reports: Reports) -> None:
    (tmp_path / "checkpoints").write_text("in the way")
    learner, progress, checkpoints = Trained(), Progress(step=2), Checkpoints(tmp_path / "checkpoints", 0, background=True)
    take(checkpoints, learner, progress)
    told = r"step-000002 could not be written \(rank 0: .*Error.*is its file system full"
    with pytest.raises(CheckpointFailed, match=told):
        take(checkpoints, learner, progress)
    with pytest.raises(CheckpointFailed, match=told):
        checkpoints.finish()
    assert reports.names == []
    assert learner.asked == 1


def test_one_that_does_not_end_is_given_up(tmp_path: Path, reports: Reports) -> None:
    learner, checkpoints = Trained(), Checkpoints(tmp_path, 0, background=True)
    reports.gate.clear()
    checkpoints.finish(0)  # nothing was taken
    take(checkpoints, learner, Progress(step=2))
    with pytest.raises(TimeoutError, match="was not written within 0 s; is the run folder's file system slow or full"):
        checkpoints.finish(0.05)
    reports.gate.set()
    checkpoints.finish()
    assert reports.names == ["step-000002"]


def test_what_is_beyond_the_registered_checkpoint_is_removed(tmp_path: Path) -> None:
    for name in ("step-000002", "step-000004", "step-000010", "step-by-step"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__0_0.distcp").touch()
    (tmp_path / "checkpoint_manager_snapshot.json").touch()
    remove_unregistered(tmp_path, 4)
    assert sorted(f.name for f in tmp_path.glob("*") if f.name != "store") == [
        "checkpoint_manager_snapshot.json",
        "step-000002",
        "step-000004",
        "step-by-step",
    ]
