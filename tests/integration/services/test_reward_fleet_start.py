"""Starting and stopping the fleet: failures name their part, and other Serve applications stay untouched."""

from __future__ import annotations

import time

import pytest
from ray import serve

from services.client.base import RewardUnavailable
from services.client.handle import HandleRewardClient
from services.fleet.file import parse_fleet
from services.fleet.start import FleetError, start_fleet, stop_fleet


@serve.deployment(ray_actor_options={"num_cpus": 0.1})
class Neighbour:
    """Another tenant of the same Serve."""

    async def __call__(self) -> str:
        return "here"


@pytest.mark.long
def test_an_impossible_fleet_says_so_and_leaves_nothing(ray_cluster: None) -> None:
    neighbour = serve.run(Neighbour.bind(), name="neighbour", route_prefix="/neighbour")
    started = time.monotonic()
    with pytest.raises(FleetError, match=r"ocr is UPDATING.*needs 1000\.1 Ray CPUs and the cluster has .*waiting does not help"):
        start_fleet(parse_fleet({"rewards": {"ocr": {"kind": "ocr", "cpus": 1000}}, "start_timeout_s": 2}))
    assert time.monotonic() - started < 30
    assert "rewards" not in serve.status().applications
    with pytest.raises(RewardUnavailable):
        HandleRewardClient(check_timeout_s=1).check(["ocr"])
    stop_fleet()  # again, with nothing to stop
    assert neighbour.remote().result(timeout_s=10) == "here"
    serve.delete("neighbour")


def test_a_scorer_that_fails_its_self_test_never_serves(ray_cluster: None) -> None:
    shrunk = {"kind": "ocr", "reading": "detection", "detection_side_limit": 32}
    with pytest.raises(FleetError, match=r"ocr is DEPLOY_FAILED: .*ScorerUnfit.*scored ItemScore"):
        start_fleet(parse_fleet({"rewards": {"ocr": shrunk}}))
    assert "rewards" not in serve.status().applications
