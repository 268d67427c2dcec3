"""`dance_grpo` against XueZeyue/DanceGRPO at 15cc71d (2025-10-16), written down anew in float64: `flux_step` and the loss of train_grpo_flux.py; and
what `mix_grpo`, Tencent-Hunyuan/MixGRPO at e5cdd6a (2025-08-08), has otherwise: Flow-GRPO's step, and advantages that are added up."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.kernels import make_kernel
from diffusion.processes import RectifiedFlow
from tests.unit.trainer.learn.published.steps import Case, case, ours
from tests.unit.trainer.learn.published.test_flow_grpo import sd3_case
from tests.unit.trainer.learn.published.test_flow_grpo import their_loss as flow_grpo_loss
from trainer.config.objective import ObjectiveConfig
from trainer.learn.advantages import Term, advantages_of, group_advantages

ETA, CLIP, STEPS = 0.3, 1e-4, (0, 2, 3, 7, 11, 14)


def flux_step(sigmas: Tensor, i: int, v: Tensor, x: Tensor, x_next: Tensor) -> Tensor:
    """Log-density of the step taken."""
    sigma, length = sigmas[i], sigmas[i] - sigmas[i + 1]
    x0 = x - sigma * v
    score = -(x - x0 * (1 - sigma)) / sigma**2
    mean = x - length * v + 0.5 * ETA**2 * score * length
    std = ETA * math.sqrt(length)
    return (-((x_next - mean) ** 2) / (2 * std**2) - math.log(std) - math.log(math.sqrt(2 * math.pi))).mean()


def their_loss(c: Case, now: Tensor) -> Tensor:
    losses, sigmas = [], c.grid.double()
    for row, i in enumerate(c.steps):
        x, x_next, a = c.x[row].double(), c.x_next[row].double(), c.advantages[row].double().clamp(-5, 5)
        ratio = torch.exp(flux_step(sigmas, i, now[row], x, x_next) - flux_step(sigmas, i, c.old[row].double(), x, x_next))
        losses.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [0.0, 1e-5, 0.05])
def test_the_loss_and_its_gradient_are_that_codes(moved: float) -> None:
    c, config = case(make_kernel("constant_sde", RectifiedFlow(3.0), ETA, 16), STEPS, moved), ObjectiveConfig(preset="dance_grpo")
    assert (config.clip, config.kl_weight, config.data_weight) == (CLIP, 0, 0)
    now = c.now.double().requires_grad_()
    theirs = their_loss(c, now)
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, config)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-6


def test_advantages_divide_by_the_groups_own_deviation_plus_1e_8() -> None:
    rewards, config = np.random.default_rng(0).normal(size=12), ObjectiveConfig(preset="dance_grpo")
    (found,) = group_advantages([rewards.tolist()], config.advantage_scale, biased=config.advantage_std == "biased", epsilon=config.advantage_epsilon)
    np.testing.assert_allclose(found, (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-8), rtol=1e-12)


@pytest.mark.parametrize("moved", [0.0, 0.05])
def test_mix_grpo_has_flow_grpos_step_without_a_kl(moved: float) -> None:
    c = sd3_case(moved)
    now = c.now.double().requires_grad_()
    theirs = flow_grpo_loss(c, now, 0.0, False)
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, ObjectiveConfig(preset="mix_grpo"))
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-6


@pytest.mark.parametrize("preset", ["dance_grpo", "mix_grpo"])
def test_advantages_of_several_rewards_are_added_up_not_averaged(preset: str) -> None:
    draw, config = np.random.default_rng(1), ObjectiveConfig(preset=preset)
    scores, weights = {name: draw.normal(size=8) for name in ("hps", "clip")}, {"hps": 1.0, "clip": 0.5}
    (found,) = advantages_of(
        [{name: values.tolist() for name, values in scores.items()}],
        {name: Term(weight) for name, weight in weights.items()},
        config.advantages,
        clip=1e9,
        epsilon=config.advantage_epsilon,
    )
    theirs = sum(weights[name] * (values - values.mean()) / (values.std(ddof=1) + 1e-8) for name, values in scores.items())
    np.testing.assert_allclose(found, theirs, rtol=1e-12)
