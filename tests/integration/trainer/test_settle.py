"""Settling is the controller's business: after a checkpoint is registered, by the right epoch, without ever raising."""

from __future__ import annotations

import ast
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from actors.connect import Target
from replay.buffer import BufferSettings, ReplayBuffer
from replay.embedded import EmbeddedRedis
from trainer.learn.settle import SettleCheckpointed

ROOT = Path(__file__).resolve().parents[3]
REGISTERED: Any = object()
"""Stands for Ray Train's Checkpoint, which the callback only compares with None."""


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Target]:
    with EmbeddedRedis.start(tmp_path) as server:
        yield Target(server.url, "run", BufferSettings(groups_per_step=1, checkpoint_interval=3))


@pytest.fixture
def trained(target: Target) -> ReplayBuffer:
    """Two steps are claimed and published in epoch 1."""
    buffer = target.buffer()
    buffer.initialise()
    epoch = buffer.rollback(0)
    for step in (1, 2):
        lease = buffer.lease("a", 0)
        assert lease is not None
        assert buffer.commit(lease, b"x", [0.0, 1.0], step - 1)
        buffer.claim(step, epoch, 0)
        buffer.publish(step, epoch)
    return buffer


def settled(buffer: ReplayBuffer) -> int:
    return buffer.counts()["settled_step"]


def test_a_registered_checkpoint_settles_its_step(target: Target, trained: ReplayBuffer) -> None:
    SettleCheckpointed(target).after_report(None, [{"step": 2, "epoch": 1}, {"step": 2, "epoch": 1}], REGISTERED)
    counts = trained.counts()
    assert (counts["settled_step"], counts["settled"], counts["bytes"], counts["trash"]) == (2, 2, 0, 0)


def test_a_report_without_a_checkpoint_settles_nothing(target: Target, trained: ReplayBuffer) -> None:
    SettleCheckpointed(target).after_report(None, [{"step": 2, "epoch": 1}], None)
    assert settled(trained) == 0


def test_a_late_report_of_an_older_learner_settles_nothing(target: Target, trained: ReplayBuffer, caplog: pytest.LogCaptureFixture) -> None:
    trained.rollback(0)
    with caplog.at_level(logging.WARNING, "trainer.learn.settle"):
        SettleCheckpointed(target).after_report(None, [{"step": 1, "epoch": 1}], REGISTERED)
    assert settled(trained) == 0
    assert "fenced" in caplog.text


def test_a_lost_server_is_logged_and_never_raised(target: Target, caplog: pytest.LogCaptureFixture) -> None:
    gone = Target("redis://127.0.0.1:1/0", "run", target.settings)
    with caplog.at_level(logging.WARNING, "trainer.learn.settle"):
        SettleCheckpointed(gone).after_report(None, [{"step": 1, "epoch": 1}], REGISTERED)
    assert "the next checkpoint settles it" in caplog.text


def test_nothing_else_in_the_trainer_settles() -> None:
    """`report` returning does not mean that a checkpoint is registered: a learner rank must never settle."""
    callers = set()
    for room in ("trainer", "actors"):
        for file in (ROOT / room).rglob("*.py"):
            calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            if any(isinstance(call, ast.Attribute) and call.attr == "settle" for call in calls):
                callers.add(str(file.relative_to(ROOT)))
    assert callers == {"trainer/learn/settle.py"}
