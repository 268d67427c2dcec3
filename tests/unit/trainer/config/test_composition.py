"""An objective in words says the weights in force, whatever its preset is called."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.composition import composition
from trainer.config.objective import ObjectiveConfig


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        ({}, "ddrl (policy 1, KL 0, data 0.01)"),
        ({"preset": "flow_grpo"}, "flow_grpo (policy 1, KL 0.04, data 0)"),
        ({"preset": "flow_grpo", "data_weight": 0.02}, "flow_grpo (policy 1, KL 0.04, data 0.02; the preset has data_weight 0)"),
        ({"data_weight": 0}, "ddrl (policy 1, KL 0, data 0; the preset has data_weight 0.01)"),
        ({"preset": "flow_grpo", "advantage_scale": "group"}, "flow_grpo (policy 1, KL 0.04, data 0; the preset has advantage_scale batch)"),
        ({"preset": "sft", "clip": 0.1}, "sft (policy 0, KL 0, data 1)"),
    ],
)
def test_composition(objective: dict[str, Any], words: str) -> None:
    assert composition(ObjectiveConfig.model_validate(objective)) == words
