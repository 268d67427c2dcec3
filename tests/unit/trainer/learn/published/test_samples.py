"""`diffusion_nft` against NVlabs/DiffusionNFT at 24af555 (2025-09-22), scripts/train_nft_sd3.py, and `awm` against
scxue/advantage_weighted_matching at be51372 (2026-03-27), scripts/train_sd3_awm.py: their losses written down anew in float64."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from diffusion.processes import RectifiedFlow, VariancePreserving
from trainer.config.objective import ObjectiveConfig
from trainer.learn.learner import old_decay
from trainer.learn.objective import Samples, sample_terms

SHAPE, BOUND = (4, 6, 8), 5.0
ADVANTAGES = (1.5, -0.7, 0.2, -5.0, 0.0, 5.0, 3.0, -1.1, 0.4)


@dataclass(frozen=True)
class Noised:
    """Finished rollouts `x0` noised to `t`, and what the current, the old and the starting network say there."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    now: Tensor
    old: Tensor
    reference: Tensor
    advantages: Tensor


def noised(moved: float) -> Noised:
    g = torch.Generator().manual_seed(0)
    rows = len(ADVANTAGES)
    x0, eps, off, away, other = torch.randn(5, rows, *SHAPE, generator=g)
    old = eps - x0 + 0.3 * off
    t = RectifiedFlow(3.0, "diffusers").time_grid(10)[:rows]
    return Noised(x0, eps, t, old + moved * away, old, old + 3 * moved * other, torch.tensor(ADVANTAGES))


def ours(c: Noised, config: ObjectiveConfig, keeps_old: bool = True) -> tuple[Tensor, Tensor]:
    """Mean loss and its gradient in the network's output; fp32 as in a run."""
    advantages = c.advantages * (config.advantage_max or BOUND) / BOUND
    rows = Samples(c.x0, c.eps, c.t, advantages, torch.ones(len(c.t)), torch.zeros(len(c.t), dtype=torch.int64), c.old if keeps_old else None)
    v = c.now.clone().requires_grad_()
    loss = sample_terms(v, c.reference, rows, RectifiedFlow(3.0), config)[0] / len(c.t)
    (gradient,) = torch.autograd.grad(loss, v)
    return loss.detach(), gradient


def agree(c: Noised, config: ObjectiveConfig, theirs: Tensor, now: Tensor) -> None:
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, config)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-6
    assert gradient.norm() > 1e-6


def nft_loss(c: Noised, now: Tensor, beta: float, kl: float) -> Tensor:
    losses = []
    for row, a in enumerate(c.advantages.double()):
        t, x0, old = c.t[row].double(), c.x0[row].double(), c.old[row].double()
        xt = (1 - t) * x0 + t * c.eps[row].double()
        r = (a.clamp(-BOUND, BOUND) / BOUND / 2 + 0.5).clamp(0, 1)
        parts = []
        for v in (beta * now[row] + (1 - beta) * old, (1 + beta) * old - beta * now[row]):
            estimate = xt - t * v
            factor = (estimate - x0).abs().mean().clip(min=1e-5).detach()
            parts.append(((estimate - x0) ** 2 / factor).mean())
        policy = (r * parts[0] / beta + (1 - r) * parts[1] / beta) * BOUND
        losses.append(policy + kl * ((now[row] - c.reference[row].double()) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_diffusion_nft_is_that_codes_loss(beta: float, moved: float) -> None:
    c, config = noised(moved), ObjectiveConfig(preset="diffusion_nft", nft_beta=beta)
    assert (config.kl_weight, config.advantage_clip, ObjectiveConfig(preset="diffusion_nft").nft_beta) == (1e-4, BOUND, 1.0)
    now = c.now.double().requires_grad_()
    agree(c, config, nft_loss(c, now, beta, 1e-4), now)


def test_without_an_old_policy_nft_starts_from_the_one_before_the_update() -> None:
    """Which is what its old policy is at the first update."""
    c, config = noised(0.0), ObjectiveConfig(preset="diffusion_nft", kl_weight=0.0)
    kept, none = ours(c, config), ours(c, config, keeps_old=False)
    torch.testing.assert_close(none, kept, rtol=1e-6, atol=1e-9)


def test_the_old_policys_decay_is_that_codes() -> None:
    """`return_decay` of kinds 1 and 2, after updates 1, 2, …"""
    first, second = ObjectiveConfig(preset="diffusion_nft"), ObjectiveConfig(preset="diffusion_nft", old_decay=0.999, old_decay_rate=0.0075, old_decay_start=75)
    for step in (1, 2, 74, 75, 76, 100, 499, 501, 5000):
        assert old_decay(first, step) == min(step * 0.001, 0.5)
        assert old_decay(second, step) == (0.0 if step < 75 else min((step - 75) * 0.0075, 0.999))


def awm_loss(c: Noised, now: Tensor, weighting: str, beta: float, ema_beta: float) -> Tensor:
    losses = []
    for row, a in enumerate(c.advantages.double()):
        t, power = c.t[row].double(), 0.25
        log_prob = -((now[row] - (c.eps[row].double() - c.x0[row].double())) ** 2).mean()
        if weighting == "t":
            log_prob = log_prob * t
        elif weighting == "t**2":
            log_prob = log_prob * t**2
        elif weighting == "ghuber":
            log_prob = -(torch.pow(-log_prob + 1e-10, power) - 1e-10**power) * t / power
        ratio = torch.exp(log_prob - log_prob.detach())
        advantage = a.clamp(-BOUND, BOUND) / BOUND * 1.0
        policy = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(0, 2))
        kl = ((now[row] - c.reference[row].double()) ** 2).mean()
        ema_kl = ((now[row] - c.old[row].double()) ** 2).mean()
        losses.append(policy + beta * kl + ema_beta * ema_kl)
    return torch.stack(losses).mean()


@pytest.mark.parametrize("moved", [0.0, 1e-3, 0.5])
@pytest.mark.parametrize(("weighting", "theirs"), [("power", "ghuber"), ("uniform", "Uniform"), ("t", "t"), ("t2", "t**2")])
def test_awm_is_that_codes_loss(weighting: str, theirs: str, moved: float) -> None:
    c, config = noised(moved), ObjectiveConfig.model_validate({"preset": "awm", "awm_weighting": weighting})
    assert (config.kl_weight, config.old_kl_weight, ObjectiveConfig(preset="awm").awm_weighting, config.awm_power) == (1e-3, 1.0, "power", 0.25)
    now = c.now.double().requires_grad_()
    agree(c, config, awm_loss(c, now, theirs, 1e-3, 1.0), now)


def test_awm_on_the_policy_is_the_advantage_weighted_diffusion_loss() -> None:
    c, config = noised(0.1), ObjectiveConfig(preset="awm", awm_weighting="uniform", advantage_max=None, kl_weight=0.0, old_kl_weight=0.0, old_decay=0.0)
    now = c.now.double().requires_grad_()
    (expected,) = torch.autograd.grad((c.advantages * RectifiedFlow().loss(now, c.x0, c.eps, c.t)).mean(), now)
    torch.testing.assert_close(ours(c, config)[1].double(), expected, rtol=1e-5, atol=1e-8)


def test_a_weighting_over_a_flows_time_is_refused_for_other_policies() -> None:
    c = noised(0.1)
    rows = Samples(c.x0, c.eps, c.t, c.advantages, torch.ones(9), torch.zeros(9, dtype=torch.int64))
    with pytest.raises(ValueError, match="awm_weighting"):
        sample_terms(c.now, None, rows, VariancePreserving(), ObjectiveConfig(preset="awm", kl_weight=0.0, old_kl_weight=0.0, old_decay=0.0))
