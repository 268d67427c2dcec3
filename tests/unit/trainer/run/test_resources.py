"""A machine that can never hold the run is said at start, with who asks for how much."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.run.resources import check_resources, needs

FLEET = {"CPU": 2.0, "GPU": 0.5}


def config(**sections: Any) -> Any:
    return parse_config({"rollout": {"generators": 3}, "learner": {"ranks": 2}, **sections})


def test_needs_are_told_by_the_key_that_asks() -> None:
    found = needs(config(rollout={"generators": 3, "gpus": 0.25}, encoder={"actors": 2, "gpus": 0.2}), FLEET)
    assert found["CPU"] == {"rollout.generators": 3, "encoder.actors": 2, "learner.ranks": 2, "rewards": 2, "evaluation, weights and data": 0.7}
    assert found["GPU"] == {"rollout.gpus": 0.75, "encoder.gpus": 0.4, "learner.gpus": 0, "rewards": 0.5}


def test_every_process_of_a_generator_asks() -> None:
    found = needs(config(rollout={"generators": 3, "gpus": 1, "sequence_ranks": 2}), FLEET)
    assert (found["CPU"]["rollout.generators"], found["GPU"]["rollout.gpus"]) == (6, 6)


def test_supervised_training_asks_for_generators_too() -> None:
    """They make its evaluations."""
    found = needs(config(objective={"preset": "sft"}, rewards={}, rollout={"generators": 2, "gpus": 0.5}), {})
    assert (found["CPU"]["rollout.generators"], found["GPU"]["rollout.gpus"]) == (2, 1.0)


def test_what_fits_exactly_is_accepted() -> None:
    check_resources(config(), FLEET, {"CPU": 7.7, "GPU": 0.5})


@pytest.mark.parametrize(
    ("total", "words"),
    [
        ({"CPU": 7.6, "GPU": 1}, ["7.7 Ray CPUs", "rollout.generators 3", "learner.ranks 2", "has 7.6", "ray.cpus"]),
        ({"CPU": 16}, ["0.5 Ray GPUs (rewards 0.5)", "has 0", "--ray-address"]),
    ],
)
def test_what_can_never_fit_is_refused(total: dict[str, float], words: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        check_resources(config(), FLEET, total)
    for word in words:
        assert word in str(error.value)
