"""The objective: its gradient at ratio one, its scalings, what padding and refusals do."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.kernel_names import KERNEL_NAMES as KERNELS
from diffusion.kernels import Previous, StepKernel, log_prob, make_kernel
from diffusion.processes import RectifiedFlow
from trainer.config.objective import ObjectiveConfig
from trainer.learn.objective import Anchors, Transitions, data_terms, policy_terms

PROCESS = RectifiedFlow(2.0)
ROWS = 5
SHAPE = (3, 4, 4)
SCALINGS = ["exact", "unscaled", "std_weighted"]


def kernel_of(name: str = "flow_sde") -> StepKernel:
    return make_kernel(name, PROCESS, 0.7, 10)


def objective(**keys: Any) -> ObjectiveConfig:
    return ObjectiveConfig(**{"preset": "dance_grpo", "clip": 0.2, **keys})


def case(name: str = "flow_sde", seed: int = 0) -> tuple[Tensor, Transitions, StepKernel]:
    """Velocities (with gradient), transitions drawn with them (ratio exactly one), the kernel."""
    g = torch.Generator().manual_seed(seed)
    kernel = kernel_of(name)
    x, velocity, noise = torch.randn(3, ROWS, *SHAPE, generator=g)
    step, grid = torch.tensor([0, 1, 3, 5, 7]), kernel.time_grid(10)
    t, t_next, t_previous = grid[step], grid[step + 1], torch.where(step > 0, grid[step - 1], torch.inf)
    x = x * kernel.process.coefficients(t)[1].reshape(-1, 1, 1, 1)
    previous = torch.randn(ROWS, *SHAPE, generator=g) * (step > 0).reshape(-1, 1, 1, 1)
    mean, std = kernel.moments(velocity.double(), x.double(), t, t_next, Previous(previous, t_previous))
    x_next = (mean + std.reshape(-1, 1, 1, 1) * noise).float()
    batch = Transitions(
        x=x,
        x_next=x_next,
        t=t,
        t_next=t_next,
        step=step,
        old_log_prob=log_prob(x_next, mean, std),
        advantage=torch.tensor([1.5, -0.5, 0.0, 2.0, -1.0]),
        weight=torch.ones(ROWS),
        text=torch.zeros(ROWS, dtype=torch.int64),
        previous=previous if kernel.uses_previous else None,
        t_previous=t_previous if kernel.uses_previous else None,
    )
    return velocity.requires_grad_(), batch, kernel


# -- gradients ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("scaling", SCALINGS)
def test_at_ratio_one_the_gradient_is_minus_advantage_times_that_of_log_p(name: str, scaling: str) -> None:
    velocity, batch, kernel = case(name)
    loss, stats = policy_terms(velocity, None, batch, kernel, objective(log_prob=scaling))
    (found,) = torch.autograd.grad(loss, velocity)

    again = velocity.detach().requires_grad_()
    mean, std = kernel.moments(again.double(), batch.x.double(), batch.t, batch.t_next, batch.history)
    (expected,) = torch.autograd.grad(-(batch.advantage * log_prob(batch.x_next, mean, std, scaling)).sum(), again)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    assert found[[0, 1, 3, 4]].abs().amax((1, 2, 3)).min() > 1e-9
    assert not found[2].any()  # no advantage, no gradient
    assert float(stats["ratio_deviation"]) == pytest.approx(0, abs=1e-5)
    assert float(stats["clipped"]) == 0


def test_a_step_along_the_gradient_makes_good_samples_likelier() -> None:
    velocity, batch, kernel = case()
    loss, _ = policy_terms(velocity, None, batch, kernel, objective())
    (gradient,) = torch.autograd.grad(loss, velocity)
    mean, std = kernel.moments((velocity.detach() - 1e-2 * gradient).double(), batch.x.double(), batch.t, batch.t_next)
    change = log_prob(batch.x_next, mean, std) - batch.old_log_prob
    assert torch.equal(change.sign(), batch.advantage.sign())


def test_weights_of_the_terms_multiply_their_gradients() -> None:
    velocity, batch, kernel = case()
    reference = velocity.detach() + 0.1
    parts = [policy_terms(velocity, reference, batch, kernel, objective(policy_weight=p, kl_weight=k))[0] for p, k in ((1, 0), (1, 1), (3, 2))]
    one, both, many = (torch.autograd.grad(loss, velocity)[0] for loss in parts)
    torch.testing.assert_close(many, 3 * one + 2 * (both - one), atol=1e-6, rtol=1e-4)


# -- ratio and clip -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_ratio_is_that_of_the_scaled_log_probs(scaling: str) -> None:
    """Stored densities are exact; the other scalings are derived from them by a factor per transition."""
    velocity, batch, kernel = case("cps")
    moved = velocity.detach() + 0.05 * torch.randn(velocity.shape, generator=torch.Generator().manual_seed(9))
    before, std = kernel.moments(velocity.detach().double(), batch.x.double(), batch.t, batch.t_next)
    after, _ = kernel.moments(moved.double(), batch.x.double(), batch.t, batch.t_next)
    ratio = (log_prob(batch.x_next, after, std, scaling) - log_prob(batch.x_next, before, std, scaling)).exp()
    loss, stats = policy_terms(moved, None, batch, kernel, objective(log_prob=scaling, clip=10.0))
    assert float(stats["ratio_deviation"]) == pytest.approx(float((ratio - 1).abs().sum()), rel=2e-3, abs=1e-5)
    assert loss.item() == pytest.approx(float(-(batch.advantage * ratio).sum()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize(("shift", "advantage", "moves"), [(0.5, 1.0, False), (0.5, -1.0, True), (-0.5, 1.0, True), (-0.5, -1.0, False), (0.1, 1.0, True)])
def test_the_clip_stops_what_has_gone_far_enough_in_its_direction(shift: float, advantage: float, moves: bool) -> None:
    """Ratios exp(±0.5) lie outside 1 ± 0.2; the pessimistic bound keeps the gradient that leads back."""
    velocity, batch, kernel = case()
    batch = replace(batch, old_log_prob=batch.old_log_prob - shift, advantage=torch.full((ROWS,), advantage))
    loss, stats = policy_terms(velocity, None, batch, kernel, objective(clip=0.2))
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert bool(gradient.any()) == moves
    ratio = math.exp(shift)
    bound = max(0.8, min(1.2, ratio))
    assert loss.item() == pytest.approx(ROWS * max(-advantage * ratio, -advantage * bound), rel=1e-4)
    assert float(stats["clipped"]) == (ROWS if abs(ratio - 1) > 0.2 else 0)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", ["flow_sde", "edm_2ab"])
def test_with_the_learners_own_density_ratios_start_at_one_and_the_gap_is_still_seen(name: str, scaling: str) -> None:
    """The sampler stored densities that are off; the gradient is A times that of log p all the same, and nothing is clipped."""
    velocity, batch, kernel = case(name)
    off = replace(batch, old_log_prob=batch.old_log_prob - 0.01)
    loss, stats = policy_terms(velocity, None, off, kernel, objective(log_prob=scaling, clip=1e-5, old_log_prob="learner"))
    (found,) = torch.autograd.grad(loss, velocity)
    again = velocity.detach().requires_grad_()
    mean, std = kernel.moments(again.double(), batch.x.double(), batch.t, batch.t_next, batch.history)
    (expected,) = torch.autograd.grad(-(batch.advantage * log_prob(batch.x_next, mean, std, scaling)).sum(), again)
    torch.testing.assert_close(found, expected, atol=1e-7, rtol=1e-4)
    assert loss.item() == -batch.advantage.sum().item()
    assert float(stats["clipped"]) == 0
    factor = {"exact": torch.ones_like(std), "unscaled": 2 * std**2, "std_weighted": std}[scaling]
    torch.testing.assert_close(stats["ratio_deviation_rows"], (0.01 * factor).expm1().abs(), atol=1e-5, rtol=2e-2)
    torch.testing.assert_close(stats["log_prob_gap_rows"], torch.full((ROWS,), 0.01), atol=1e-5, rtol=0)
    assert float(stats["ratio_deviation"]) == pytest.approx(float(stats["ratio_deviation_rows"].sum()))


# -- reverse KL -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_the_kl_of_equal_velocities_is_zero_and_grows_with_the_square(name: str) -> None:
    velocity, batch, kernel = case(name)
    config = objective(kl_weight=1.0)
    equal, stats = policy_terms(velocity, velocity.detach().clone(), batch, kernel, config)
    assert float(stats["reverse_kl"]) == 0
    alone, _ = policy_terms(velocity, None, batch, kernel, config)
    assert equal.item() == alone.item()
    near, far = (float(policy_terms(velocity, velocity.detach() + d, batch, kernel, config)[1]["reverse_kl"]) for d in (0.1, 0.2))
    assert far == pytest.approx(4 * near, rel=1e-3)
    assert near > 0


def test_the_kl_is_the_gaussians_mean_over_entries() -> None:
    velocity, batch, kernel = case()
    reference = velocity.detach() + 0.3
    mean, std = kernel.moments(velocity.detach(), batch.x, batch.t, batch.t_next)
    other, _ = kernel.moments(reference, batch.x, batch.t, batch.t_next)
    wide = std.reshape(-1, 1, 1, 1).expand_as(mean)
    expected = torch.distributions.kl_divergence(torch.distributions.Normal(mean, wide), torch.distributions.Normal(other, wide)).mean((1, 2, 3)).sum()
    _, stats = policy_terms(velocity, reference, batch, kernel, objective(kl_weight=0.04))
    assert float(stats["reverse_kl"]) == pytest.approx(float(expected), rel=1e-4)


# -- padding and refusals -------------------------------------------------------------------------------------------


def test_rows_of_weight_zero_add_nothing() -> None:
    velocity, batch, kernel = case()
    reference, config = velocity.detach() + 0.1, objective(kl_weight=0.5)
    weight = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0])
    padded, stats = policy_terms(velocity, reference, replace(batch, weight=weight), kernel, config)
    (gradient,) = torch.autograd.grad(padded, velocity)
    kept = [0, 2, 4]
    rows = Transitions(**{name: None if value is None else value[kept] for name, value in vars(batch).items()})
    alone, alone_stats = policy_terms(velocity[kept], reference[kept], rows, kernel, config)
    assert padded.item() == pytest.approx(alone.item(), rel=1e-5)
    for name, value in alone_stats.items():
        assert float(value.sum()) == pytest.approx(float(stats[name].sum()), rel=1e-4, abs=1e-6), name
        assert value.dim() == 0 or not stats[name][[1, 3]].any(), name
    assert not gradient[[1, 3]].any()


def test_a_transition_without_noise_is_refused() -> None:
    velocity, batch, kernel = case("cps")
    still = replace(batch, t_next=torch.cat([batch.t_next[:4], torch.tensor([1e-5])]))
    with pytest.raises(ValueError, match=r"a trained transition has std .* < 0.0001: choose other sampler.trained_steps"):
        policy_terms(velocity, None, still, kernel, objective())


def test_statistics_carry_no_gradient() -> None:
    velocity, batch, kernel = case()
    loss, stats = policy_terms(velocity, velocity.detach() + 0.1, batch, kernel, objective(kl_weight=0.1))
    assert loss.requires_grad
    assert not any(v.requires_grad for v in stats.values())


# -- data term ------------------------------------------------------------------------------------------------------


def test_the_data_term_is_the_weighted_diffusion_loss() -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps, velocity = torch.randn(3, 4, *SHAPE, generator=g)
    batch = Anchors(x0, eps, torch.rand(4, generator=g), torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.int64))
    velocity.requires_grad_()
    loss = data_terms(velocity, batch, PROCESS)
    error = (velocity - (eps - x0)).square().mean((1, 2, 3))
    assert loss.item() == pytest.approx(error[[0, 1, 3]].sum().item(), rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert not gradient[2].any()
    assert float(data_terms(eps - x0, batch, PROCESS)) == 0
