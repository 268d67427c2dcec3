"""What Prometheus is told of the rewards."""

from __future__ import annotations

from services.contract import ModelHealth
from services.rest.metrics import FleetMetrics


def test_replicas_that_nobody_could_count_are_no_number() -> None:
    metrics = FleetMetrics()
    metrics.health([ModelHealth(name="a", status="ready", replicas=2), ModelHealth(name="b", status="unhealthy", replicas=None)])
    text = metrics.text().decode()
    assert 'ddrl_reward_model_replicas{model="a"} 2.0' in text
    assert 'ddrl_reward_model_replicas{model="b"} NaN' in text
