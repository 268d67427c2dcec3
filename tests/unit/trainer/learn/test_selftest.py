"""The log-probability contract: what the engine stores, the learner finds again; and the test of it before a run starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.kernel_names import KERNEL_NAMES
from tests.gloo import alone
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.learner import Learner
from trainer.learn.selftest import MEMBERS, SelfTest, requests_of, self_test, shapes_of
from trainer.run.scalars import scalars


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


def config_of(folder: Path, objective: dict[str, Any] | None = None, dtype: str = "float32", **sampler: Any) -> RunConfig:
    return parse_config(
        {
            "model": {"path": str(folder), "init": True, "dtype": dtype},
            "sampler": {"noise_level": 0.8, "steps": 6, "trained_steps": 3, "height": 8, "width": 16, **sampler},
            "objective": objective or {},
            "learner": {"ranks": 1, "micro_batch": 5},
        }
    )


def learner_of(config: RunConfig) -> Learner:
    """With every parameter random: fresh weights predict zero."""
    made = Learner(config, torch.device("cpu"))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.model.parameters():
            local = parameter.to_local()  # type: ignore[attr-defined]
            local += 0.05 * torch.randn(local.shape, generator=g)
    return made


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_every_kernel_replays_to_ratio_one(kernel: str, guidance: float, policy_folder: Path) -> None:
    """Two sizes packed in one batch of the engine, replayed apart in micro-batches, exact scaling, fp32."""
    made = learner_of(config_of(policy_folder, kernel=kernel, guidance=guidance, trained_steps=4, negative_prompt="no sign"))
    assert shapes_of(made) == [(3, 8, 16), (3, 8, 8)]
    found = self_test(made)
    assert found.transitions == 2 * MEMBERS * 4
    assert 0 <= found.mean <= found.largest < 1e-6
    assert found.gap < 1e-6
    assert found.refusal(made.config) is None


@pytest.mark.parametrize(
    ("scheduler", "kernel"),
    [
        ({"_class_name": "EDMEulerScheduler"}, "edm_2ab"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "v_prediction"}, "ancestral"),
        ({"_class_name": "EDMEulerScheduler"}, "cps"),
        ({"_class_name": "DDIMScheduler", "prediction_type": "v_prediction"}, "ddim_eta"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}, "cps"),
    ],
)
def test_policies_of_other_processes_replay_too(scheduler: dict[str, Any], kernel: str, policy_folder: Path) -> None:
    """What the network is shown and told differs from the state and its time, on both sides alike."""
    (policy_folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    made = learner_of(config_of(policy_folder, kernel=kernel))
    assert made.kernel.process is made.process
    assert self_test(made).largest < 1e-6


@pytest.mark.parametrize("guidance", [1.0, 4.5])
@pytest.mark.parametrize("kernel", KERNEL_NAMES)
def test_bf16_is_below_a_tenth_of_the_clip_or_refused(kernel: str, guidance: float, policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder, {"clip": 1e-3}, "bfloat16", kernel=kernel, guidance=guidance))
    found = self_test(made)
    assert 0 < found.largest < 0.5
    assert (found.refusal(made.config) is None) == (found.largest <= 1e-4)


def test_a_wrong_replay_is_noticed(policy_folder: Path) -> None:
    """A learner that forgets the guidance finds other densities."""
    made = learner_of(config_of(policy_folder, guidance=4.5))
    assert made.guidance is not None
    made.guidance = replace(made.guidance, scale=4.4)
    good = requests_of(made, 0)[0]
    assert good.guidance == 4.5
    found = self_test(made)
    assert found.largest > 1e-4
    message = found.refusal(made.config)
    assert message is not None
    assert "objective.old_log_prob=learner" in message
    assert "\n" not in message
    assert f"{found.largest:.2g}" in message
    assert "clip/10 = 0.0001" in message


def test_the_learner_is_left_as_it_was(policy_folder: Path) -> None:
    config = config_of(policy_folder)
    made = learner_of(config)
    before = {n: v.clone() for n, v in made.full_state().items()}
    state = torch.random.get_rng_state()
    self_test(made)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert made.model.training
    assert all(torch.equal(v, before[n]) for n, v in made.full_state().items())
    assert not any(p.grad is not None for p in made.model.parameters())


def test_the_rank_names_the_noise_and_nothing_else(policy_folder: Path) -> None:
    """Ranks with other trained steps would make other numbers of forward passes, and FSDP would hang."""
    made = learner_of(config_of(policy_folder))
    first = requests_of(made, 0)
    for rank in range(1, 6):
        for a, b in zip(requests_of(made, rank), first, strict=True):
            assert (a.trained, a.stochastic, a.shape) == (b.trained, b.stochastic, b.shape)
            assert a.seed != b.seed


def test_a_token_budget_of_one_sample_is_enough(policy_folder: Path) -> None:
    config = config_of(policy_folder)
    made = learner_of(config)
    tokens = made.model.packed_tokens(made.shape, 10)
    tight = config.model_copy(update={"sampler": config.sampler.model_copy(update={"max_tokens": tokens})})
    made.config = tight
    assert self_test(made).largest < 1e-6


def test_a_size_that_the_model_does_not_take_is_left_out(policy_folder: Path) -> None:
    made = learner_of(config_of(policy_folder, width=4))
    assert shapes_of(made) == [(3, 8, 4)]
    assert self_test(made).transitions == MEMBERS * 3


def result(largest: float) -> SelfTest:
    return SelfTest(12, largest, largest / 2, largest, {1: largest, 4: 0.0}, 0.25)


@pytest.mark.parametrize(
    ("old", "largest", "refused"), [("rollout", 2e-4, True), ("rollout", 9e-5, False), ("learner", 2.0, False), ("rollout", float("inf"), True)]
)
def test_only_ratios_against_the_rollout_are_refused(old: str, largest: float, refused: bool, policy_folder: Path) -> None:
    config = config_of(policy_folder, {"old_log_prob": old, "clip": 1e-3})
    assert (result(largest).refusal(config) is not None) == refused
    record = result(largest).record(config, 7)
    assert (record["kind"], record["step"], record["old_log_prob"]) == ("self_test", 7, old)
    assert (record["refused"] is not None) == refused
    assert ("ratio_deviation_max" in record) == (largest < 10)
    tags = dict(scalars(record))
    assert tags["self_test/limit"] == pytest.approx(1e-4)
    assert tags["self_test/ratio_deviation_by_step/4"] == 0
