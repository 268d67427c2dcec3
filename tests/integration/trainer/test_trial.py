"""The doctor's trial of a real recipe, and of three broken ones: the fault is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.engine.engine import Engine
from diffusion.processes import RectifiedFlow
from services.contract import ItemScore
from services.scorers.base import Scorer
from services.scorers.settings import RewardSettings
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.doctor import trial as module
from trainer.doctor.finding import Finding
from trainer.doctor.judge_trial import judge
from trainer.doctor.trial import trial
from trainer.solo.loop import SoloLoop

ROOT = Path(__file__).resolve().parents[3]
SMALL = ["rollout.group_size=4", f"model.path={ROOT / 'recipes/glyph-base'}"]


class Constant(Scorer):
    """Says 0.5 of everything."""

    name, media, reward, sub_scores, needs_prompt = "flat", ("image",), "flat", ("flat",), False
    revision, preprocessing = "flat-1", "none"

    def __init__(self, settings: RewardSettings) -> None:
        pass

    def self_test(self) -> None:
        pass

    def score(self, prompts: Any, media: Any) -> list[Any]:
        return [ItemScore(0.5, {"flat": 0.5}) for _ in media]


class Shifted(SoloLoop):
    """Samples with another sigma shift than it learns with."""

    def _engine(self) -> Engine:
        return Engine(self.learner.model, RectifiedFlow(3.0), self.config.sampler.max_tokens)


def config_of(*overrides: str) -> RunConfig:
    return load_config(ROOT / "recipes/glyph-ocr.yaml", [*SMALL, *overrides])


def found(config: RunConfig, monkeypatch: pytest.MonkeyPatch, loop: type[SoloLoop] = SoloLoop) -> dict[str, Finding]:
    monkeypatch.setattr(module, "UPDATES", 3)
    threads = torch.get_num_threads()
    try:
        return {f.check.removeprefix("trial: "): f for f in judge(trial(config, 1, loop))}
    finally:
        torch.set_num_threads(threads)


def test_the_demos_recipe_is_as_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(config_of(), monkeypatch)
    assert set(told) == {"reward", "reward spread", "log-probability", "gradients", "updates"}
    assert {f.level for f in told.values()} == {"ok"}


def test_another_sigma_shift_in_the_sampler_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(config_of(), monkeypatch, Shifted)["log-probability"]
    assert told.level == "problem"
    assert "sampled on another time grid than flow_sde's" in told.found


def test_a_learning_rate_a_hundred_times_too_high_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(config_of("optimizer.lr=1.5e-2"), monkeypatch)["updates"]
    assert told.level == "problem"
    assert "optimizer.lr is too high" in told.advice


def test_a_constant_reward_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    kind = f"{__name__}:Constant"
    told = found(config_of("rewards={flat: {weight: 1.0}}", f"fleet.rewards={{flat: {{kind: '{kind}'}}}}"), monkeypatch)["reward spread"]
    assert told.level == "problem"
    assert "is it constant" in told.advice


def test_losses_on_finished_rollouts_are_tried_without_densities(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(config_of("objective.preset=diffusion_nft", "sampler.noise_on=none", "objective.data_weight=0.1"), monkeypatch)
    assert "log-probability" not in told
    assert [told[name].level for name in ("reward", "reward spread", "updates")] == ["ok"] * 3


def test_given_frames_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    told = found(config_of("sampler.given_frames=1"), monkeypatch)
    assert told["trial"].level == "ok"
    assert "rollouts that are given frames are not made in one process" in told["trial"].found
