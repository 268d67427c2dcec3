"""`ddrl_cosmos` against nvidia-cosmos/cosmos-rl at 89f2e5b5 (2026-07-31), written down anew in float64: `rl_training_step` of wfm_trainer.py, what it
makes of rewards, and `draw_training_sigma_and_epsilon` of v2v_model.py."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.kernels import make_kernel
from diffusion.processes import EDM, RectifiedFlow, VariancePreserving
from diffusion.processes.flow_time import cosmos_times
from tests.unit.trainer.learn.published.steps import Case, case, ours
from trainer.config.objective import ObjectiveConfig
from trainer.config.run import RunConfig
from trainer.learn.advantages import Term, advantages_of
from trainer.learn.objective import Anchors, data_terms

CLIP, STEPS, TRAINED = 1e-4, 20, (0, 2, 4, 6, 8, 10, 12, 14, 16, 18)


def churned() -> Case:
    """20 steps as that code counts them, the clean-up apart, and the even ones trained; the starting policy is far away."""
    found = case(make_kernel("edm_2ab", RectifiedFlow(), 1.0, STEPS + 1), TRAINED, 1e-6)
    return replace(found, reference=found.old + 0.3 * found.previous)


def phi1(z: float) -> float:
    return (math.exp(z) - 1) / z


def phi2(z: float) -> float:
    return (phi1(z) - 1) / z


def mu(c: Case, row: int, v: Tensor) -> Tensor:
    """The next state before it is churned, from the prediction of x_0 and the stored one of the step before."""
    eta = min(1 / (STEPS + 1), math.sqrt(1.2) - 1)
    i, x = c.steps[row], c.x[row].double()
    now, then = float(c.grid[i].double()), float(c.grid[i + 1].double()) / (1 + eta if i < STEPS - 1 else 1)
    t = now / (1 + now)
    x0 = x * (1 - t) - t * v
    h = math.log(now / then)
    if i == 0:
        return then / now * x + (1 - then / now) * x0
    before = float(c.grid[i - 1].double())
    c2 = math.log(now / before) / h
    b2 = phi2(-h) / c2
    return math.exp(-h) * x + h * ((phi1(-h) - b2) * x0 + b2 * c.previous[row].double())


def their_loss(c: Case, now: Tensor, kl_beta: float) -> Tensor:
    losses = []
    for row in range(len(c.steps)):
        sample, a = c.x_next[row].double(), c.advantages[row].double().clamp(-5, 5)
        current, old, reference = (mu(c, row, v) for v in (now[row], c.old[row].double(), c.reference[row].double()))
        ratio = torch.exp((-((sample - current) ** 2 - (sample - old) ** 2)).mean())
        losses.append(torch.maximum(-a * ratio, -ratio.clamp(1 - CLIP, 1 + CLIP) * a) + kl_beta * ((reference - current) ** 2).mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize("kl_beta", [0.0, 0.01])
def test_the_loss_and_its_gradient_are_that_codes(kl_beta: float) -> None:
    c, config = churned(), ObjectiveConfig(preset="ddrl_cosmos", kl_weight=kl_beta)
    assert (config.log_prob, config.clip, config.kl_scale, config.data_weight) == ("unscaled", CLIP, "unscaled", 0.01)
    now = c.now.double().requires_grad_()
    theirs = their_loss(c, now, kl_beta)
    (gradient,) = torch.autograd.grad(theirs, now)
    loss, found = ours(c, config)
    torch.testing.assert_close(loss.double(), theirs.detach(), rtol=1e-6, atol=1e-7)
    assert float((found - gradient).norm() / gradient.norm()) < 1e-5  # the network's output has fp32's digits, times a sigma of 200


@pytest.mark.parametrize("space", ["flow", "sigma"])
def test_the_data_loss_is_the_weighted_error_of_x0(space: str) -> None:
    """(1 + sigma²)/sigma² (x̃ - x̂0)², with x̂0 of the rectified flow that the EDM state is scaled to."""
    g = torch.Generator().manual_seed(0)
    clean, eps, velocity = torch.randn(3, 6, 4, 5, 6, generator=g)
    sigma = torch.tensor([150.0, 30.0, 4.0, 1.0, 0.2, 0.03])
    flow = RectifiedFlow()
    process, t = (flow, sigma / (1 + sigma)) if space == "flow" else (EDM.of_flow(flow), sigma)
    s, weight = sigma.double().reshape(-1, 1, 1, 1), torch.ones(6)
    noisy = (clean.double() + s * eps.double()) / (1 + s)
    x0 = noisy - s / (1 + s) * velocity.double()
    theirs = ((1 + s**2) / s**2 * (clean.double() - x0) ** 2).mean((1, 2, 3)).sum()
    found = data_terms(
        velocity, Anchors(clean, eps, t, weight, torch.zeros(6, dtype=torch.int64)), process, ObjectiveConfig(preset="ddrl_cosmos").data_weighting
    )
    assert float(found) == pytest.approx(float(theirs), rel=1e-5)
    plain = data_terms(velocity, Anchors(clean, eps, t, weight, torch.zeros(6, dtype=torch.int64)), process)
    assert float(plain) > float(found)


def test_evaluated_at_the_first_trained_step_alone_the_data_loss_has_a_kth_of_its_weight() -> None:
    def share(**objective: str) -> float:
        return RunConfig.model_validate(
            {"objective": {"preset": "ddrl_cosmos", **objective}, "sampler": {"steps": 21, "trained_steps": list(TRAINED)}}
        ).data_share

    assert share() == 0.01
    assert share(data_per="first") == pytest.approx(0.001)


def their_advantages(scores: list[list[float | None]], exponential: bool) -> np.ndarray:
    """Of one group: by reward the mean for what failed, then the deviation; the mean over rewards, the map, the clamp."""
    parts = []
    for of_reward in scores:
        known = np.array([r for r in of_reward if r is not None])
        filled = np.array([known.mean() if r is None else r for r in of_reward])
        parts.append(filled if len(filled) == 1 else (filled - filled.mean()) / (filled.std(ddof=1) + 1e-4))
    mean = sum(parts) / len(parts)
    return np.clip(-np.exp(-mean) if exponential else mean, -5, 5)


@pytest.mark.parametrize("exponential", [False, True])
@pytest.mark.parametrize(
    "scores",
    [[[0.1, 0.9, 0.4, 0.3]], [[0.1, 0.9, None, 0.3], [30.0, 10.0, 20.0, 5.0]], [[0.7]], [[0.7], [9.0]]],
    ids=["one", "two, one failed", "N = 1", "both"],
)
def test_advantages_are_that_codes(scores: list[list[float | None]], exponential: bool) -> None:
    config = ObjectiveConfig(preset="ddrl_cosmos", exponential_advantage=exponential)
    group = {f"r{i}": of_reward for i, of_reward in enumerate(scores)}
    (found,) = advantages_of(
        [group],
        {name: Term() for name in group},
        config.advantages,
        config.failed_reward,
        config.advantage_scale,
        config.advantage_clip,
        config.exponential_advantage,
        biased=config.advantage_std == "biased",
        epsilon=config.advantage_epsilon,
    )
    np.testing.assert_allclose(found, their_advantages(scores, exponential), rtol=1e-9, atol=1e-12)


def test_fresh_noise_levels_follow_that_codes_law() -> None:
    """ln sigma normal around ln 4 with 1.2, times √24 for 24 latent frames; a twentieth log-uniform from 200 to 100,000, which pictures do not have."""
    n = 200_000
    sigma = cosmos_times(EDM.of_flow(RectifiedFlow()), n, 24, torch.Generator().manual_seed(0)).double()
    expected = 0.95 * torch.special.ndtr((torch.tensor([4.0, 20, 80]).log() - math.log(4 * math.sqrt(24))) / 1.2)
    assert [float((sigma < bound).double().mean()) for bound in (4, 20, 80)] == pytest.approx(expected.tolist(), abs=0.005)
    beyond = 0.05 * math.log(100_000 / 2000) / math.log(100_000 / 200) + 0.95 * float(torch.special.ndtr(-(torch.tensor(2000.0).log() - math.log(19.6)) / 1.2))
    assert float((sigma > 2000).double().mean()) == pytest.approx(beyond, abs=0.002)
    picture = cosmos_times(RectifiedFlow(), n, 1, torch.Generator().manual_seed(0)).double()
    log_sigma = (picture / (1 - picture)).log()
    assert float(log_sigma.mean()) == pytest.approx(math.log(4), abs=0.01)
    assert float(log_sigma.std()) == pytest.approx(1.2, abs=0.01)
    with pytest.raises(ValueError, match=r"objective\.data_times=cosmos is stated for a network that predicts a flow's velocity"):
        cosmos_times(VariancePreserving(), 4, 1, torch.Generator())
