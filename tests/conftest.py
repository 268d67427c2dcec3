"""In parallel by file: files that take long begin first, what shares the Ray cluster stays in one worker, one thread each.

A worker of pytest-xdist begins a test once it holds the one after it, so at the end a file can wait behind a long one
while others idle. Files are therefore dealt in rounds: a long one for each worker, then a short one for each.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from trainer.run.environment import EXACT

for variable in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):  # read when torch and numpy are imported
    os.environ.setdefault(variable, "1")
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", EXACT["ONEDNN_MAX_CPU_ISA"])

TESTS = Path(__file__).parent
CLUSTER = "ray_cluster"
"""Fixture, and name of the group of all tests that use it."""

LONG = (
    CLUSTER,
    "e2e/test_run.py",
    "chaos/test_bitwise_resume.py",
    "chaos/test_kill_matrix.py",
    "e2e/test_stop.py",
    "e2e/test_serve_signals.py",
    "e2e/test_refusals.py",
    "unit/trainer/learn/test_ranks.py",
    "unit/trainer/learn/test_mesh.py",
    "e2e/test_rest_docs.py",
    "e2e/test_docs.py",
    "e2e/test_kernels.py",
    "integration/replay/test_replay_model.py",
    "integration/replay/test_replay_embedded.py",
    "integration/replay/test_replay_cluster.py",
    "integration/replay/test_replay_ledger.py",
    "e2e/test_add_a_reward.py",
    "integration/diffusion/test_sd3_export.py",
    "integration/diffusion/test_sd3_pipeline.py",
    "integration/diffusion/test_pipeline_parity.py",
    "integration/services/test_generated_requests.py",
)
"""Groups that take longest, by falling duration; all others are short."""


def group_of(item: pytest.Item) -> str:
    """What goes to one worker together."""
    return CLUSTER if CLUSTER in getattr(item, "fixturenames", ()) else item.path.relative_to(TESTS).as_posix()


def dealt(groups: list[str], workers: int) -> list[str]:
    """Order of the groups: as many long ones as there are workers, as many short ones, and so on."""
    long = [group for group in LONG if group in groups]
    short = [group for group in groups if group not in LONG]
    order: list[str] = []
    while long or short:
        for waiting in (long, short):
            order += waiting[:workers]
            del waiting[:workers]
    return order


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
    """Name each test's group to pytest-xdist and put the groups in order; without workers, the order stays as it is."""
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        for item in items:
            item.add_marker(pytest.mark.xdist_group(group_of(item)))
        order = dealt(list(dict.fromkeys(map(group_of, items))), worker["workercount"])
        place = {group: number for number, group in enumerate(order)}
        items.sort(key=lambda item: place[group_of(item)])
    yield
    if worker is not None and config.option.loadgroup:  # pytest-xdist sets it in workers
        lost = [item.nodeid for item in items if not item.nodeid.endswith(f"@{group_of(item)}")]
        if lost:  # every worker would start servers and clusters of its own for the tests that share them
            raise pytest.UsageError(f"pytest-xdist has not taken the groups of {len(lost)} tests, such as {lost[0]}: install the pytest of constraints.txt")
