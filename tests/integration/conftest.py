"""One real Ray for all integration tests: logical CPUs beyond the machine's, no dashboard, no token auth."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before Ray is imported anywhere: it turns token authentication on by itself for a local cluster, and its
# workers find the packages through PYTHONPATH.
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
ROOT = str(Path(__file__).resolve().parents[2])
if ROOT not in os.environ.get("PYTHONPATH", "").split(os.pathsep):
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (ROOT, os.environ.get("PYTHONPATH"))))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """A local Ray with 16 logical CPUs; Serve, if a test started it, goes down with it."""
    import ray

    # "local": a cluster of our own, whatever else runs or ran on this machine; pictures are small, so is its object store
    options = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False, "object_store_memory": 200 << 20}
    ray.init("local", num_cpus=16, **options, _system_config={"metrics_report_interval_ms": 1000})
    yield
    ray.shutdown()
