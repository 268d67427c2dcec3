"""Runs of the real pipeline, small, with kill points planned in their processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.points import FOLDER
from tests.pipeline import REDUCED, ROOT, Run, settings

UPDATES = 6
"""Updates of a chaos run; checkpoints after 2, 4 and 6."""

# No evaluation worth the name: only what a learner update needs. Strict order, so that resumes can be compared bit by bit.
SMALL = (
    *REDUCED,
    f"updates={UPDATES}",
    "evaluation.every=0",
    "evaluation.test_prompts=2",
    "evaluation.loss_points=2",
    "evaluation.diversity_prompts=1",
    "evaluation.diversity_samples=2",
    "evaluation.grid_prompts=1",
    "optimizer.ema=0.9",
    "replay.max_staleness=0",
)


class ChaosRun(Run):
    """A run whose Ray workers carry the kill points planned in `<folder>.kills`."""

    def __init__(self, folder: Path, *arguments: str, **options: Any) -> None:
        self.kills = folder.with_suffix(".kills")
        environment = {FOLDER: str(self.kills), "PYTHONPATH": str(ROOT)} | options.pop("environment", {})
        super().__init__(folder, *settings(*SMALL), *arguments, program="tests.chaos.launch", environment=environment, **options)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., ChaosRun]]:
    """Start runs that are ended whatever happens. Kills are planned before, in `tmp_path / "<name>.kills"`."""
    runs: list[ChaosRun] = []

    def make(name: str, *arguments: str, **options: Any) -> ChaosRun:
        run = ChaosRun(tmp_path / name, *arguments, **options)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.end()
