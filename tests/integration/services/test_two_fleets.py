"""Two runs in one Ray cluster: each has a fleet of its own, and one that ends takes nothing from the other."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import numpy as np
import pytest
from ray import serve

from services.client.base import UNAVAILABLE, RewardUnavailable
from services.client.connect import connect
from services.config import FleetConfig, fleet_of
from services.contract import ItemScore, ScoreFailure
from services.fleet.start import start_fleet, stop_fleet
from tests.integration.services.probe_scorers import KIND

IMAGES = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (10, 200)])
PROMPTS = ["a", "b"]
FIRST = fleet_of(FleetConfig(), ["jpeg", "scene"])
SECOND = FleetConfig.model_validate({"rewards": {"mean": {"kind": KIND}}})


@pytest.fixture
def fleets(ray_cluster: None) -> Iterator[None]:
    assert start_fleet(FIRST, "run-one", http=False) == "serve://run-one"
    start_fleet(SECOND, "run-two", http=False)
    yield
    for app in ("run-one", "run-two"):
        stop_fleet(app)


def test_one_that_ends_leaves_the_other_scoring(fleets: None) -> None:
    one, two = connect(FIRST, "run-one"), connect(SECOND, "run-two")
    both = one.score_all(["jpeg", "scene"], PROMPTS, IMAGES, 60)
    assert {name: [type(result) for result in results] for name, results in both.items()} == {name: [ItemScore] * 2 for name in ("jpeg", "scene")}
    assert set(one.info(["jpeg", "scene"])) == {"jpeg", "scene"}
    with pytest.raises(RewardUnavailable, match="serve://run-one/mean"):
        one.score("mean", PROMPTS, IMAGES, 5)
    partly = one.score_all(["jpeg", "mean"], PROMPTS, IMAGES, 60)
    assert [type(result) for result in partly["jpeg"]] == [ItemScore] * 2
    assert [(r.code, r.retryable) for r in partly["mean"] if isinstance(r, ScoreFailure)] == [(UNAVAILABLE, True)] * 2
    before = two.score("mean", PROMPTS, IMAGES, 60)
    stop_fleet("run-one")
    assert two.score("mean", PROMPTS, IMAGES, 60) == before
    assert list(serve.status().applications) == ["run-two"]
    stop_fleet("run-two")
    assert serve.status().applications == {}
    with pytest.raises(RewardUnavailable):
        two.score("mean", PROMPTS, IMAGES, 5)


@pytest.mark.long
def test_fleets_with_http_have_an_address_each(ray_cluster: None) -> None:
    try:
        main, own = start_fleet(FIRST), start_fleet(SECOND, "run-two")
        assert own == f"{main}/run-two"
        for url, names in ((main, ["jpeg", "scene"]), (own, ["mean"])):
            assert [model["name"] for model in httpx.get(f"{url}/v1/models", timeout=30).json()["models"]] == names
            client = connect(FleetConfig(url=url), "")
            assert list(client.check(names)) == names
            assert all(isinstance(result, ItemScore) for results in client.score_all(names, PROMPTS, IMAGES, 60).values() for result in results)
            client.close()
        assert [httpx.get(f"{own}/{path}", timeout=30).status_code for path in ("docs", "docs/swagger-ui.css", "openapi.json")] == [200] * 3
        answer = httpx.get(f"{main}/healthz", timeout=30, headers={"X-Request-ID": "mine-1"})
        assert answer.headers.get_list("X-Request-ID") == ["mine-1"]
        assert len(httpx.get(f"{main}/healthz", timeout=30).headers.get_list("X-Request-ID")) == 1
        stop_fleet()
        assert httpx.get(f"{own}/v1/models", timeout=30).status_code == 200
    finally:
        stop_fleet()
        stop_fleet("run-two")
