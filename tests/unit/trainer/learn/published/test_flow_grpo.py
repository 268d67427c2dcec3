"""`flow_grpo` and `flow_grpo_2025_06` against yifan123/flow_grpo at ac4c86e (2025-07-18) and f37646f (2025-06-16), written down anew in float64:
`sde_step_with_logprob`, the loss of scripts/train_sd3.py and `PerPromptStatTracker`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.kernels import make_kernel
from diffusion.processes import RectifiedFlow
from tests.unit.trainer.learn.published.steps import Case, case, ours
from trainer.config.objective import ObjectiveConfig
from trainer.learn.advantages import Term, advantages_of

NOISE_LEVEL, CLIP, STEPS = 0.7, 1e-4, tuple(range(9))  # the last of ten steps is not trained
BETA = {"flow_grpo": 0.04, "flow_grpo_2025_06": 0.004}


def sd3_case(moved: float) -> Case:
    """On the grid of diffusers' SD3 scheduler, which that code samples on."""
    return case(make_kernel("flow_sde", RectifiedFlow(3.0, "diffusers"), NOISE_LEVEL, 10), STEPS, moved)


def sde_step(sigmas: Tensor, i: int, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, g, and the step's length."""
    sigma, dt = sigmas[i], sigmas[i + 1] - sigmas[i]
    g = torch.sqrt(sigma / (1 - (sigmas[1] if sigma == 1 else sigma))) * NOISE_LEVEL
    mean = x * (1 + g**2 / (2 * sigma) * dt) + v * (1 + g**2 * (1 - sigma) / (2 * sigma)) * dt
    return mean, g, -dt


def their_log_prob(x_next: Tensor, mean: Tensor, g: Tensor, length: Tensor) -> Tensor:
    std = g * length.sqrt()
    return (-((x_next - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))).mean()


def their_loss(c: Case, now: Tensor, beta: float, with_length: bool) -> Tensor:
    losses, sigmas = [], c.grid.double()
    for row, i in enumerate(c.steps):
        x, x_next = c.x[row].double(), c.x_next[row].double()
        mean, g, length = sde_step(sigmas, i, now[row], x)
        old, _, _ = sde_step(sigmas, i, c.old[row].double(), x)
        ratio = torch.exp(their_log_prob(x_next, mean, g, length) - their_log_prob(x_next, old, g, length))
        a = c.advantages[row].double()
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP))
        reference, _, _ = sde_step(sigmas, i, c.reference[row].double(), x)
        kl = ((mean - reference) ** 2).mean() / (2 * (g**2 * length if with_length else g**2))
        losses.append(policy + beta * kl)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [0.0, 1e-4, 0.05])
@pytest.mark.parametrize("preset", BETA)
def test_the_loss_and_its_gradient_are_that_codes(preset: str, moved: float) -> None:
    """On-policy, at the clip, and far beyond it."""
    c, config = sd3_case(moved), ObjectiveConfig(preset=preset)
    assert (config.kl_weight, config.clip) == (BETA[preset], CLIP)
    now = c.now.double().requires_grad_()
    theirs = their_loss(c, now, BETA[preset], preset == "flow_grpo_2025_06")
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, config)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-6
    assert gradient.norm() > 1e-6


def test_the_two_kinds_of_kl_differ_by_the_length_of_the_step() -> None:
    """Why 0.04 belongs to the one and 0.004 to the other: at the first step of ten of SD3 it is a factor of 25."""
    c = sd3_case(0.0)
    c = type(c)(**{**vars(c), "steps": (0,), "reference": c.old + 0.1, "advantages": torch.zeros(9)})
    one = type(c)(**{name: value[:1] if isinstance(value, Tensor) and name != "grid" else value for name, value in vars(c).items()})
    both = [float(ours(one, ObjectiveConfig(preset="flow_grpo", kl_weight=1.0, kl_scale=scale))[0]) for scale in ("rate", "step")]
    assert both[1] / both[0] == pytest.approx(1 / float(c.grid[0] - c.grid[1]), rel=1e-5)
    assert both[1] / both[0] == pytest.approx(25, rel=0.02)


def their_tracker(prompts: Sequence[str], rewards: Sequence[float], global_std: bool) -> np.ndarray:
    names, values, found = np.array(prompts), np.array(rewards, np.float64), np.zeros(len(rewards))
    for prompt in set(prompts):
        of_prompt = names == prompt
        std = values.std() if global_std else values[of_prompt].std()
        found[of_prompt] = (values[of_prompt] - values[of_prompt].mean()) / (std + 1e-4)
    return found


@pytest.mark.parametrize("scale", ["batch", "group"])
def test_advantages_are_the_trackers_with_a_prompt_in_two_groups(scale: str) -> None:
    draw = np.random.default_rng(0)
    prompts, groups = ["a", "b", "a", "c"], [draw.normal(size=n).tolist() for n in (4, 3, 5, 1)]
    config = ObjectiveConfig(preset="flow_grpo", advantage_scale=scale)
    assert (config.advantage_baseline, config.advantage_std, ObjectiveConfig(preset="flow_grpo").advantage_scale) == ("prompt", "biased", "batch")
    found = advantages_of(
        [{"r": group} for group in groups],
        {"r": Term()},
        config.advantages,
        scale=scale,
        clip=1e9,
        biased=True,
        epsilon=config.advantage_epsilon,
        prompts=prompts,
    )
    names = [prompt for prompt, group in zip(prompts, groups, strict=True) for _ in group]
    theirs = their_tracker(names, [r for group in groups for r in group], scale == "batch")
    np.testing.assert_allclose([a for group in found for a in group], theirs, rtol=1e-12, atol=1e-12)
