"""A reward that has not come up: its requests may come back later, those of the others go on, and nobody gets the wrong one."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from services.contract import ModelHealth, ModelInfo
from services.errors import ProblemError
from services.fleet.file import parse_fleet
from services.fleet.local_backend import LocalBackend
from services.limits import LimitsConfig
from services.media.arrays import plan_pixels
from services.rest.metrics import FleetMetrics
from services.rest.requests import ScoreCall
from services.rest.schemas import ScoreOptions
from services.rest.scoring import Scoring


class Half(LocalBackend):
    """Of its two rewards, one does not come up."""

    async def models(self) -> list[ModelInfo]:
        return [info for info in await super().models() if info.name != "down"]

    async def health(self) -> list[ModelHealth]:
        return [ModelHealth(name=name, status="ready" if name == "up" else "starting") for name in ("up", "down")]


def ask(**options: object) -> str:
    config = parse_fleet({"rewards": {"up": {"kind": "jpeg"}, "down": {"kind": "jpeg"}}})
    scoring = Scoring(Half(config.rewards), LimitsConfig(), FleetMetrics())
    call = ScoreCall(ScoreOptions.model_validate(options), [""], [plan_pixels(np.zeros((8, 8, 3), np.uint8), None, False)])
    return asyncio.run(scoring.answer(call, 10)).model_dump_json()


def test_the_others_go_on() -> None:
    assert '"model":"up"' in ask(model="up")


def test_the_one_that_is_down_may_come_back() -> None:
    for options in ({"model": "down"}, {"rewards": ["up", "down"]}):
        with pytest.raises(ProblemError) as error:
            ask(**options)
        assert (error.value.status, error.value.code) == (503, "scorer_unavailable")
        assert error.value.retry_after_s


def test_nobody_gets_a_reward_that_was_not_asked_for() -> None:
    with pytest.raises(ProblemError, match="name a model or rewards; there is up, down"):
        ask()
    with pytest.raises(ProblemError, match="no model 'other'"):
        ask(model="other")
