"""Whole runs at a documented reduced size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.pipeline import REDUCED, Run, settings


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Start runs that are ended whatever happens."""
    runs: list[Run] = []

    def make(name: str, *arguments: str, **options: Any) -> Run:
        run = Run(tmp_path / name, *settings(*REDUCED), *arguments, **options)
        runs.append(run)
        return run

    yield make
    for run in runs:
        run.end()
