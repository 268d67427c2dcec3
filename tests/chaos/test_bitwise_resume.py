"""A run that was killed and resumed ends bit for bit like one that never was.

Strict mode: staleness 0, window 1, fixed seeds, one thread per process, one group per pack (design: ruling 7). Compared
are weights, optimiser, moving average, and every metric that is not a time or a count of what happened to be in flight.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.chaos.conftest import UPDATES, ChaosRun
from tests.chaos.points import fired, plan
from tests.pipeline import check_ledger, records

OBSERVED = ("time", "seconds", "groups")
"""Fields of a metrics line that say when something happened or what was in flight then."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run nobody disturbed."""
    run = ChaosRun(tmp_path_factory.mktemp("reference") / "run")
    try:
        run.succeed()
        yield run.folder
    finally:
        run.end()


def learner_state(folder: Path) -> dict[str, Any]:
    """Model, optimiser and moving average of the last checkpoint, whole."""
    file = folder / "state.pt"
    dcp_to_torch_save(folder / "checkpoints" / f"step-{UPDATES:06d}", file)
    state: dict[str, Any] = torch.load(file, weights_only=False)
    return state


def flat(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in sorted(tree.items(), key=lambda item: str(item[0])):
            yield from flat(value, f"{name}/{key}")
    elif isinstance(tree, list | tuple):
        for i, value in enumerate(tree):
            yield from flat(value, f"{name}/{i}")
    else:
        yield name, tree


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in line.items() if k not in OBSERVED} for line in records(folder, "update")]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


def assert_bitwise_equal(folder: Path, reference: Path) -> None:
    assert metrics(folder) == metrics(reference)
    ours, theirs = dict(flat(learner_state(folder))), dict(flat(learner_state(reference)))
    assert ours.keys() == theirs.keys()
    kinds = {name.split("/")[1] for name, value in ours.items() if isinstance(value, torch.Tensor)}
    assert kinds == {"model", "optimizer", "ema"}
    assert [name for name in ours if not same(ours[name], theirs[name])] == []


@pytest.mark.long
def test_rank_killed_in_the_middle_of_an_interval(start: Callable[..., ChaosRun], tmp_path: Path, reference: Path) -> None:
    """Step 4 is claimed and lost; the group goes back to the checkpoint of step 2 and is served steps 3 and 4 again."""
    name = plan(tmp_path / "run.kills", "rank after claim", step=4, rank=1)
    run = start("run")
    run.succeed()
    assert fired(run.kills)[name]["meta"]["settled_step"] == "2"
    assert check_ledger(run.folder, UPDATES)["epoch"] == 2
    assert_bitwise_equal(run.folder, reference)


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "rank", "step"),
    [("rank after training", 0, 4), ("rank after report", 1, 4), ("rank after claim", 0, 1), ("rank while writing", 1, 4), ("rank after writing", 0, 4)],
)
def test_rank_killed_elsewhere(start: Callable[..., ChaosRun], tmp_path: Path, reference: Path, point: str, rank: int, step: int) -> None:
    plan(tmp_path / "run.kills", point, step=step, rank=rank)
    run = start("run")
    run.succeed()
    assert len(fired(run.kills)) == 1
    check_ledger(run.folder, UPDATES)
    assert_bitwise_equal(run.folder, reference)


@pytest.mark.long
def test_producers_and_scorer_killed(start: Callable[..., ChaosRun], tmp_path: Path, reference: Path) -> None:
    for point in ("generator before payload", "generator after payload", "feeder before commit", "scorer in batch"):
        plan(tmp_path / "run.kills", point, after=3)
    run = start("run")
    run.succeed()
    assert len(fired(run.kills)) == 4
    check_ledger(run.folder, UPDATES)
    assert_bitwise_equal(run.folder, reference)


@pytest.mark.long
def test_driver_and_redis_killed(start: Callable[..., ChaosRun], tmp_path: Path, reference: Path) -> None:
    run = start("run")
    run.wait_for(lambda: run.updates() >= 1, "the first update")
    run.kill("redis-server 127.0.0.1")
    run.wait_for(lambda: run.updates() >= 3, "an update after the first checkpoint")
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(10)
    assert run.leftovers() == []
    again = start("run", "--resume")
    again.succeed()
    check_ledger(again.folder, UPDATES)
    assert_bitwise_equal(again.folder, reference)
