"""`grpo_guard` against X-GenGroup/Flow-Factory at a0b2bc5 (2026-05-02), written down anew in float64: the Flow-SDE step of its scheduler, the loss of
`GRPOGuardTrainer.optimize`, and the advantages of one reward."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.kernels import make_kernel
from diffusion.processes import RectifiedFlow
from tests.unit.trainer.learn.published.steps import Case, case, ours
from trainer.config.objective import ObjectiveConfig
from trainer.learn.advantages import Term, advantages_of

NOISE_LEVEL, CLIP, STEPS = 0.7, 1e-4, (1, 2, 3)  # sde_steps of examples/grpo/full/sd3_5
GUARD = ObjectiveConfig(preset="grpo_guard")


def flow_case(moved: float, seed: int = 0) -> Case:
    return case(make_kernel("flow_sde", RectifiedFlow(3.0, "diffusers"), NOISE_LEVEL, 10), STEPS, moved, seed)


def sde_step(sigmas: Tensor, i: int, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, `std_dev_t` and `dt` < 0."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    g = torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * NOISE_LEVEL
    return x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt, g, dt


def their_log_ratios(c: Case, now: Tensor, centred: bool = True) -> Tensor:
    found, sigmas = [], c.grid.double()
    for row, i in enumerate(c.steps):
        x, x_next = c.x[row].double(), c.x_next[row].double()
        mean, g, dt = sde_step(sigmas, i, now[row], x)
        old_mean, _, _ = sde_step(sigmas, i, c.old[row].double(), x)
        std = g * torch.sqrt(-dt)

        def log_prob(at: Tensor, std: Tensor = std, x_next: Tensor = x_next) -> Tensor:
            return (-((x_next - at) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))).mean()

        scale_factor = torch.sqrt(-dt) * g
        mse = (mean - old_mean).pow(2).mean()
        found.append((log_prob(mean) - log_prob(old_mean)) * scale_factor + centred * mse / (2 * scale_factor))
    return torch.stack(found)


@pytest.mark.parametrize("moved", [0.0, 1e-4, 0.05])
def test_the_loss_and_its_gradient_are_that_codes(moved: float) -> None:
    """On-policy, at the clip, and far beyond it."""
    c = flow_case(moved)
    now = c.now.double().requires_grad_()
    ratio, a = torch.exp(their_log_ratios(c, now)), c.advantages.double()
    theirs = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, GUARD)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-5
    assert gradient.norm() > 1e-6


def test_log_ratios_have_their_mean_at_zero_and_plain_ones_below() -> None:
    """What the term is for: over rollouts of the old policy, a plain log-ratio is minus the KL on average, and the clip cuts one side alone."""
    cases = [flow_case(3.0, seed) for seed in range(200)]
    for centred in (True, False):
        found = torch.stack([their_log_ratios(c, c.now.double(), centred) for c in cases])
        error = found.std(0) / math.sqrt(len(cases))
        off = found.mean(0) / error
        assert bool((off.abs() < 4).all() if centred else (off < -10).all())


def test_advantages_are_those_of_a_group_with_its_own_deviation_over_n() -> None:
    """Of one reward; that code takes max(std, 1e-6) where ours adds 1e-6."""
    rewards = np.random.default_rng(0).uniform(size=(3, 6))
    expected = (rewards - rewards.mean(1, keepdims=True)) / np.maximum(rewards.std(1, keepdims=True), 1e-6)
    found = advantages_of(
        [{"ocr": list(group)} for group in rewards],
        {"ocr": Term()},
        GUARD.advantages,
        scale=GUARD.advantage_scale,
        biased=GUARD.advantage_std == "biased",
        epsilon=GUARD.advantage_epsilon,
        prompts=["a", "b", "c"] if GUARD.advantage_baseline == "prompt" else None,
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
