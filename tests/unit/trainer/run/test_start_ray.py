"""A local Ray cluster that is slow to start gets a second try, and no other error does."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import ray

import trainer.run.cluster
from trainer.config.run import RayConfig
from trainer.run.cluster import start_ray
from trainer.run.errors import RunFailed

SLOW = "The current node timed out during startup. This could happen because some of the raylet failed to startup."


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is asked of Ray and the system; each start of Ray takes its end from `ends`."""
    told: list[str] = []
    monkeypatch.setattr(ray, "shutdown", lambda: told.append("shutdown"))
    monkeypatch.setattr(trainer.run.cluster, "own_folder", lambda stack: tmp_path)
    monkeypatch.setattr(trainer.run.cluster, "sweep", list)
    monkeypatch.setattr(trainer.run.cluster, "end_processes", lambda folder: told.append(f"end {folder.name}"))
    return told


def starts(monkeypatch: pytest.MonkeyPatch, said: list[str], *ends: str) -> None:
    left = list(ends)

    def init(address: str, **settings: Any) -> None:
        said.append(f"init {address}")
        end = left.pop(0)
        if end:
            raise Exception(end)  # what Ray raises

    monkeypatch.setattr(ray, "init", init)


def test_a_node_that_is_slow_to_start_gets_a_second_try(monkeypatch: pytest.MonkeyPatch, said: list[str], tmp_path: Path) -> None:
    starts(monkeypatch, said, SLOW, "")
    with ExitStack() as stack:
        start_ray(RayConfig(), stack)
        assert said == ["init local", "shutdown", f"end {tmp_path.name}", "init local"]


@pytest.mark.parametrize(("ends", "tries"), [((SLOW, SLOW), 2), (("no such address",), 1)])
def test_it_is_told_when_it_does_not_start(ends: tuple[str, ...], tries: int, monkeypatch: pytest.MonkeyPatch, said: list[str]) -> None:
    starts(monkeypatch, said, *ends)
    with ExitStack() as stack, pytest.raises(RunFailed, match="a local Ray cluster did not start: Exception: " + ends[-1][:20]):
        start_ray(RayConfig(), stack)
    assert said.count("init local") == tries
