"""Signs of reward hacking: what is one, what is not, and what is said."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.hacking import HackingConfig
from trainer.run.hacking import scene_z, signs

LOSSES = [0.5, 1.0, 1.5, 2.0]


def evaluation(loss: float = 1.0, diversity: float = 1.0, brightness: float = 0.5, digest: str = "a") -> dict[str, Any]:
    """Loss and diversity times these factors, point by point."""
    return {
        "set": digest,
        "revisions": {},
        "scene": {"brightness": brightness, "contrast": 0.2},
        "scene_std": {"brightness": 0.1, "contrast": 0.0},
        "per_prompt": {"rewards": {}, "sub_scores": {}, "diffusion_loss": [loss * x for x in LOSSES], "diversity": [diversity * x for x in LOSSES]},
    }


@pytest.mark.parametrize(
    ("config", "now", "told"),
    [
        ({}, {}, []),
        ({}, {"loss": 1.09, "brightness": 0.79, "diversity": 0.1}, []),
        ({}, {"loss": 0.5, "brightness": 0.21}, []),
        ({}, {"loss": 1.12}, ["held-out diffusion loss +12.0% (standard error 3.1%) since the start, limit hacking.loss_rise=0.1"]),
        ({}, {"brightness": 0.81}, ["brightness +3.1 standard deviations of the starting policy's pictures away, limit hacking.scene_z=3"]),
        ({}, {"brightness": 0.1}, ["brightness -4.0 standard deviations of the starting policy's pictures away, limit hacking.scene_z=3"]),
        ({"loss_rise": 0.2, "scene_z": 5}, {"loss": 1.12, "brightness": 0.1}, []),
        ({"loss_rise": None, "scene_z": None}, {"loss": 9.0, "brightness": 9.0}, []),
        ({"diversity_fall": 0.3}, {"diversity": 0.71}, []),
        ({"diversity_fall": 0.3}, {"diversity": 0.6}, ["diversity -40.0% (standard error 10.3%) since the start, limit hacking.diversity_fall=0.3"]),
        ({"stop": "off"}, {"loss": 9.0, "brightness": 9.0}, []),
        ({}, {"loss": 9.0, "brightness": 9.0, "digest": "b"}, []),  # another evaluation set
    ],
)
def test_what_is_told(config: dict[str, Any], now: dict[str, Any], told: list[str]) -> None:
    assert signs(HackingConfig(**config), evaluation(), evaluation(**now)) == told


def test_several_signs_are_told_one_by_one() -> None:
    assert len(signs(HackingConfig(diversity_fall=0.1), evaluation(), evaluation(2.0, 0.5, 0.9))) == 3


def test_a_statistic_that_did_not_vary_has_no_z() -> None:
    found = scene_z(evaluation(), evaluation(brightness=0.6) | {"scene": {"brightness": 0.6, "contrast": 0.9}})
    assert found == pytest.approx({"brightness": 1.0})
    assert scene_z({"scene": {"brightness": 0.5}}, evaluation()) == {}  # of an evaluation of before there were deviations
