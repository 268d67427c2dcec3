"""What the paper claims, on problems that can be solved exactly: the optimum of its objective, with its transform of the reward and without; what states
that the data never shows keep; the diffusion loss as a forward KL; the policy loss as a gradient of log p."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffusion.kernels import log_prob, make_kernel
from diffusion.processes import EDM, ForwardProcess, RectifiedFlow, VariancePreserving
from trainer.config.objective import ObjectiveConfig
from trainer.learn.objective import Transitions, policy_terms

Array = NDArray[np.float64]

# -- the optimum on seven states ------------------------------------------------------------------------------------

DATA = np.array([0.30, 0.20, 0.15, 0.15, 0.12, 0.08, 0.0])
"""p_data; the last state is off its support"""
REWARD = np.array([0.1, 0.6, 0.3, 0.0, 0.5, 0.2, 2.0])
"""and has by far the highest reward."""
ON = slice(0, 6)
BETAS = [0.2, 0.5, 1.0, 2.0, 5.0]


def tilt(beta: float) -> Array:
    """p_data exp(r/β), normalised."""
    weights = DATA * np.exp(REWARD / beta)
    return weights / weights.sum()


def transformed(beta: float) -> Array:
    """λ((r - Z)/β) with λ(u) = -exp(-u) and Z = β log E exp(r/β) under the data (DDRL §1.2)."""
    return -np.exp(-REWARD / beta) * (DATA * np.exp(REWARD / beta)).sum()


def objective(p: Array, weights: Array) -> float:
    """E_p[weights] - KL(p_data ‖ p), but for the entropy of the data."""
    return float(p @ weights + DATA[ON] @ np.log(p[ON]))


@cache
def learnt(beta: float, transform: bool) -> Array:
    """Exponentiated-gradient ascent from the uniform policy; without the transform the reward over β is what is maximised."""
    logits, weights, rate = np.zeros(7), transformed(beta) if transform else REWARD / beta, 0.02
    for _ in range(60_000):
        p = np.exp(logits - logits.max())
        p /= p.sum()
        slope = weights + np.divide(DATA, p, out=np.zeros(7), where=DATA > 0)
        logits += rate * (slope - p @ slope)
    return p


@pytest.mark.parametrize("beta", BETAS[1:])
def test_with_the_transform_the_optimum_is_the_exponential_tilt_of_the_data(beta: float) -> None:
    """Theorem 3.1. Whatever the reward of the state that the data never shows, it keeps nothing."""
    p, expected = learnt(beta, True), tilt(beta)
    np.testing.assert_allclose(p, expected, atol=1e-6)
    assert expected[6] == 0


@pytest.mark.parametrize("beta", BETAS)
def test_no_perturbation_of_the_tilt_is_better(beta: float) -> None:
    best, draw = tilt(beta), np.random.default_rng(0)
    value = objective(best, transformed(beta))
    for _ in range(300):
        other = draw.dirichlet(np.ones(7))  # moves mass onto the last state too
        for share in (1e-4, 1e-2, 0.3):
            assert objective((1 - share) * best + share * other, transformed(beta)) < value
    assert objective((1 - 1e-6) * best + 1e-6 * np.eye(7)[6], transformed(beta)) < value


def exact_linear(beta: float) -> Array:
    """The optimum without the transform: p = p_data / (ν - r/β) on the data's support; what is left over, where a state off it asks for more than ν,
    is that state's."""
    low, high = REWARD[ON].max() / beta, REWARD[ON].max() / beta + 1 + 1e-9
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (DATA[ON] / (middle - REWARD[ON] / beta)).sum() > 1 else (low, middle)
    nu = max(high, REWARD[6] / beta)
    p = np.append(DATA[ON] / (nu - REWARD[ON] / beta), 0.0)
    p[6] = 1 - p.sum()
    return p


@pytest.mark.parametrize("beta", BETAS)
def test_without_it_the_optimum_is_another_tilt(beta: float) -> None:
    np.testing.assert_allclose(learnt(beta, False), exact_linear(beta), atol=2e-3 if beta == BETAS[3] else 1e-5)


def test_without_it_a_state_off_the_data_keeps_mass_as_long_as_the_regulariser_is_weak() -> None:
    """What the practical algorithm, which drops the transform, does not protect against, and `exponential_advantage` does."""
    left = [float(learnt(beta, False)[6]) for beta in BETAS]
    assert left == sorted(left, reverse=True)
    assert left[0] > 0.8
    assert left[2] > 0.3
    assert left[4] < 1e-6
    assert max(float(learnt(beta, True)[6]) for beta in BETAS[1:]) < 1e-6


def test_what_pulls_a_state_off_the_data_down_fades_with_its_reward() -> None:
    """λ is negative everywhere but close to 0 where the reward is high: at β = 0.2 the last state loses its mass, and slowly."""
    assert -1e-3 < transformed(0.2)[6] < 0
    assert float(learnt(0.2, True)[6]) < 0.01 * float(learnt(0.2, False)[6])


def test_for_strong_regularisation_both_optima_agree() -> None:
    """On the support, for β that keeps the last state empty: the linear form is the first order of the exponential one."""
    gaps = [float(np.abs(exact_linear(beta) - tilt(beta)).max()) for beta in (5.0, 10.0, 20.0)]
    assert gaps[0] < 0.01
    assert gaps[1] / gaps[0] == pytest.approx(0.25, abs=0.05)
    assert gaps[2] / gaps[1] == pytest.approx(0.25, abs=0.05)


# -- the data term --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("process", [RectifiedFlow(3.0), EDM(), VariancePreserving()], ids=["flow", "edm", "vp"])
def test_the_forward_kl_of_a_step_is_the_diffusion_loss_times_a_weight_of_the_time(process: ForwardProcess) -> None:
    """KL(q(x' | x, x_0) ‖ p_θ(x' | x)) of Gaussians with one variance, q the posterior of the forward process: the weight knows nothing of θ, x_0 or x,
    so minimising the data term minimises the forward KL, each time with a weight of its own (DDRL §1.2)."""
    g, kernel = torch.Generator().manual_seed(0), make_kernel("ddim_eta", process, 1.0, 10)
    grid = kernel.time_grid(10)
    for i in (1, 4, 7):
        clean, eps, said = torch.randn(3, 64, 3, 4, 4, generator=g, dtype=torch.float64)
        t, t_next = grid[i].expand(64), grid[i + 1].expand(64)
        a, s = (c.double().reshape(-1, 1, 1, 1) for c in process.coefficients(t))
        x, truth = a * clean + s * eps, process.target(clean, eps, t).double()
        mean, std = kernel.moments(said, x, t, t_next)
        posterior, _ = kernel.moments(truth, x, t, t_next)
        kl = (posterior - mean).square().flatten(1).mean(1) / (2 * std.double().square())
        loss = (said - truth).square().flatten(1).mean(1)
        weight = kl / loss
        assert float(weight.std() / weight.mean()) < 1e-4
        torch.testing.assert_close(process.loss(said, clean, eps, t).double(), loss, rtol=1e-5, atol=1e-6)


# -- the policy term ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", ["exact", "std_weighted", "unscaled"])
@pytest.mark.parametrize("name", ["flow_sde", "constant_sde", "cps", "ddim_eta", "edm_euler", "ancestral"])
def test_on_policy_the_gradient_is_minus_the_advantage_times_that_of_log_p(name: str, scaling: str) -> None:
    """Against finite differences of the density that is written down, entry by entry of a small output."""
    g, kernel = torch.Generator().manual_seed(0), make_kernel(name, RectifiedFlow(2.0), 0.7, 10)
    grid, step = kernel.time_grid(10), torch.tensor([1, 4, 7])
    t, t_next = grid[step], grid[step + 1]
    x, velocity, noise = torch.randn(3, 3, 1, 2, 2, generator=g)
    mean, std = kernel.moments(velocity.double(), x.double(), t, t_next)
    x_next = (mean + std.double().reshape(-1, 1, 1, 1) * noise).float()
    columns: dict[str, Any] = {"x": x, "x_next": x_next, "t": t, "t_next": t_next, "step": step, "old_log_prob": log_prob(x_next, mean, std)}
    advantage = torch.tensor([1.3, -0.4, 0.8])
    rows = Transitions(**columns, advantage=advantage, weight=torch.ones(3), text=torch.zeros(3, dtype=torch.int64))
    said = velocity.requires_grad_()
    loss, _ = policy_terms(said, None, rows, kernel, ObjectiveConfig(preset="dance_grpo", log_prob=scaling, clip=0.2))
    (found,) = torch.autograd.grad(loss, said)

    def density(v: torch.Tensor) -> torch.Tensor:
        return log_prob(x_next, *kernel.moments(v, x.double(), t, t_next), scaling)

    expected, width = torch.zeros(3, 1, 2, 2, dtype=torch.float64), 1e-4
    for place in np.ndindex(1, 2, 2):
        away = torch.zeros(3, 1, 2, 2, dtype=torch.float64)
        away[(slice(None), *place)] = width
        slope = (density(said.detach().double() + away) - density(said.detach().double() - away)) / (2 * width)
        expected[(slice(None), *place)] = -advantage.double() * slope
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-7)
