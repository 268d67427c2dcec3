"""`flow_cps` against IamCreateAI/FlowCPS at b402c7a (2025-09-11), written down anew in float64: its `sde_step_with_logprob` and the loss of
scripts/train_sd3.py; and `flow_grpo_fast` against yifan123/flow_grpo at a482878 (2025-08-19), which has Flow-GRPO's step, another clip, and no KL."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from diffusion.kernels import make_kernel
from diffusion.processes import RectifiedFlow
from tests.unit.trainer.learn.published.steps import Case, case, ours
from tests.unit.trainer.learn.published.test_flow_grpo import sd3_case, their_loss
from trainer.config.objective import ObjectiveConfig

NOISE_LEVEL, CLIP, BETA, STEPS = 0.7, 1e-4, 0.04, tuple(range(9))


def step(sigmas: Tensor, i: int, v: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation."""
    std = sigmas[i + 1] * math.sin(NOISE_LEVEL * math.pi / 2)
    return (x - sigmas[i] * v) * (1 - sigmas[i + 1]) + (x + v * (1 - sigmas[i])) * torch.sqrt(sigmas[i + 1] ** 2 - std**2), std


def cps_loss(c: Case, now: Tensor) -> Tensor:
    losses, sigmas = [], c.grid.double()
    for row, i in enumerate(c.steps):
        x, x_next, a = c.x[row].double(), c.x_next[row].double(), c.advantages[row].double()
        (mean, std), (old, _), (reference, _) = (step(sigmas, i, v, x) for v in (now[row], c.old[row].double(), c.reference[row].double()))
        ratio = torch.exp(-((x_next - mean) ** 2).mean() + ((x_next - old) ** 2).mean())
        losses.append(torch.maximum(-a * ratio, -a * ratio.clamp(1 - CLIP, 1 + CLIP)) + BETA * ((mean - reference) ** 2).mean() / (2 * std**2))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [0.0, 1e-4, 0.05])
def test_the_loss_and_its_gradient_are_that_codes(moved: float) -> None:
    c = case(make_kernel("cps", RectifiedFlow(3.0, "diffusers"), NOISE_LEVEL, 10), STEPS[:8], moved)
    now = c.now.double().requires_grad_()
    theirs = cps_loss(c, now)
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, ObjectiveConfig(preset="flow_cps"))
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-6


@pytest.mark.parametrize("moved", [0.0, 1e-5, 0.05])
def test_the_fast_one_is_flow_grpos_with_another_clip(moved: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.unit.trainer.learn.published.test_flow_grpo.CLIP", 1e-5)
    c, config = sd3_case(moved), ObjectiveConfig(preset="flow_grpo_fast")
    now = c.now.double().requires_grad_()
    theirs = their_loss(c, now, 0.0, False)
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, config)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm().clamp_min(1e-12)) < 1e-6
