"""Step kernels on distributions whose velocity is known in closed form, and their log-densities.

The toy: data N(0, s²). Then x_t ~ N(0, (1 - t)² s² + t²) and the exact velocity is E[eps - x0 | x] = c(t) x. A step of
any kernel is linear in x, x' = m x + std z, so the variance after it is m² var(t) + std², to compare with var(t').
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Normal

from diffusion.kernels import StepKernel, log_prob, make_kernel, ode_step
from diffusion.processes import RectifiedFlow

PROCESS = RectifiedFlow(2.0)
NAMES = ["flow_sde", "constant_sde", "cps", "ddim_eta"]
TIMES = st.floats(0.05, 0.99)


def variance(t: Tensor, s: float) -> Tensor:
    return (1 - t) ** 2 * s**2 + t**2


def exact_velocity(x: Tensor, t: Tensor, s: float) -> Tensor:
    return x * (t - (1 - t) * s**2) / variance(t, s)


def step_variance(kernel: StepKernel | None, t: Tensor, t_next: Tensor, s: float, before: Tensor) -> Tensor:
    """Variance of x' when x has variance `before`; None = the ODE."""
    one = torch.ones(len(t), 1)
    velocity = exact_velocity(one, t[:, None], s)
    if kernel is None:
        mean, std = ode_step(PROCESS, velocity, one, t, t_next), torch.zeros_like(t)
    else:
        mean, std = kernel.moments(velocity, one, t, t_next)
    return mean[:, 0] ** 2 * before + std**2


@pytest.mark.parametrize("s", [0.3, 1.0, 2.0])
@pytest.mark.parametrize(("name", "level"), [(None, 0.0), ("flow_sde", 0.7), ("constant_sde", 0.5), ("ddim_eta", 0.4), ("ddim_eta", 1.0)])
def test_small_steps_keep_the_marginal(name: str | None, level: float, s: float) -> None:
    kernel = None if name is None else make_kernel(name, PROCESS, level, 10)
    t = torch.linspace(0.2, 0.8, 13)
    errors = []
    for d in (0.04, 0.02):
        after, wanted = step_variance(kernel, t, t - d, s, variance(t, s)), variance(t - d, s)
        errors.append(float(((after - wanted) / wanted).abs().max()))
    assert errors[1] < 0.02
    assert errors[1] < 0.35 * errors[0]  # local error of second order: halving a step quarters it


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_trajectory_ends_in_the_data(name: str) -> None:
    """Eighty steps, the last deterministic. CPS keeps the marginals only where x0 is certain, so its data is one point."""
    s, steps = (0.0 if name == "cps" else 0.7), 80
    kernel, grid = make_kernel(name, PROCESS, 0.6, steps), PROCESS.time_grid(steps)
    var = torch.ones(1)
    for i in range(steps):
        var = step_variance(kernel if i < steps - 1 else None, grid[i : i + 1], grid[i + 1 : i + 2], s, var)
    assert float(var) == pytest.approx(s**2, rel=0.1, abs=1e-6)


@given(t=TIMES, fraction=st.floats(0.01, 0.99), level=st.floats(0.05, 1.0), name=st.sampled_from(["cps", "ddim_eta"]))
def test_cps_and_ddim_keep_the_noise_level(t: float, fraction: float, level: float, name: str) -> None:
    """(noise left in the mean)² + std² = t'², and the data part is (1 - t') x0: exact for any step size."""
    kernel = make_kernel(name, PROCESS, level, 10)
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(1, 4, generator=g), torch.randn(1, 4, generator=g)
    now, then = torch.tensor([t]), torch.tensor([t * fraction])
    x = PROCESS.noise(x0, eps, now)
    mean, std = kernel.moments(PROCESS.target(x0, eps, now), x, now, then)
    left = (mean - (1 - then) * x0) / eps
    torch.testing.assert_close(left.square() + std.square(), (then**2).expand(1, 4), atol=2e-4, rtol=0)
    assert float(std) <= float(then) + 1e-6


def test_cps_noise_share_is_the_sine() -> None:
    kernel = make_kernel("cps", PROCESS, 0.5, 10)
    _, std = kernel.moments(torch.zeros(1, 2), torch.zeros(1, 2), torch.tensor([0.9]), torch.tensor([0.6]))
    assert float(std) == pytest.approx(0.6 * math.sin(math.pi / 4))


def test_ddim_with_eta_one_draws_the_exact_posterior() -> None:
    """For a known x0 the ancestral step is the Gaussian posterior of x' given x and x0, in closed form."""
    t, t_next = torch.tensor([0.7]), torch.tensor([0.4])
    x0, eps = torch.tensor([[0.3]]), torch.tensor([[1.2]])
    x = PROCESS.noise(x0, eps, t)
    mean, std = make_kernel("ddim_eta", PROCESS, 1.0, 10).moments(PROCESS.target(x0, eps, t), x, t, t_next)
    # forward transition x_t = a x' + b z with a = (1 - t)/(1 - t'), b² = t² - a² t'²
    a = (1 - t) / (1 - t_next)
    b2 = t**2 - (a * t_next) ** 2
    posterior_variance = 1 / (1 / t_next**2 + a**2 / b2)
    posterior_mean = posterior_variance * ((1 - t_next) * x0 / t_next**2 + a * x / b2)
    torch.testing.assert_close(std.square(), posterior_variance)
    torch.testing.assert_close(mean, posterior_mean)


@pytest.mark.parametrize("name", ["flow_sde", "constant_sde"])
def test_reverse_sde_formula(name: str) -> None:
    """Against the SDE written with the score, drift v - g²/2 score, score = -(x + (1 - t) v) / t."""
    kernel = make_kernel(name, PROCESS, 0.8, 10)
    g = torch.Generator().manual_seed(1)
    x, v = torch.randn(2, 5, 3, generator=g)
    t, d = torch.linspace(0.1, 0.9, 5), 0.05
    diffusion = 0.8 * (t / (1 - t)).sqrt() if name == "flow_sde" else torch.full((5,), 0.8)
    score = -(x + (1 - t[:, None]) * v) / t[:, None]
    mean, std = kernel.moments(v, x, t, t - d)
    torch.testing.assert_close(mean, x - d * (v - diffusion[:, None] ** 2 / 2 * score))
    torch.testing.assert_close(std, diffusion * d**0.5)


@given(steps=st.integers(2, 100), level=st.floats(0.05, 2.0), name=st.sampled_from(NAMES))
def test_the_first_step_is_finite(steps: int, level: float, name: str) -> None:
    kernel, grid = make_kernel(name, PROCESS, level, steps), PROCESS.time_grid(steps)
    x = torch.randn(1, 4, generator=torch.Generator().manual_seed(0))
    mean, std = kernel.moments(-x, x, grid[:1], grid[1:2])
    assert mean.isfinite().all()
    assert 0 < float(std) < 100


def test_flow_sde_at_one_uses_the_second_node() -> None:
    grid = PROCESS.time_grid(10)
    _, std = make_kernel("flow_sde", PROCESS, 0.7, 10).moments(torch.zeros(1, 1), torch.zeros(1, 1), grid[:1], grid[1:2])
    assert float(std) == pytest.approx(0.7 * math.sqrt(1 / (1 - grid[1])) * math.sqrt(1 - grid[1]))


@given(t=TIMES, fraction=st.floats(0.0, 0.99), seed=st.integers(0, 99))
def test_the_ode_step_is_eulers(t: float, fraction: float, seed: int) -> None:
    x, v = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(seed))
    now, then = torch.tensor([t]), torch.tensor([t * fraction])
    torch.testing.assert_close(ode_step(PROCESS, v, x, now, then), x + (then - now)[:, None] * v, atol=1e-6, rtol=1e-5)


@given(t=TIMES, fraction=st.floats(0.0, 0.99), name=st.sampled_from(NAMES))
def test_without_noise_every_kernel_is_the_ode(t: float, fraction: float, name: str) -> None:
    x, v = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(3))
    now, then = torch.tensor([t]), torch.tensor([t * fraction])
    mean, std = make_kernel(name, PROCESS, 0.0, 10).moments(v, x, now, then)
    assert float(std) == 0
    torch.testing.assert_close(mean, ode_step(PROCESS, v, x, now, then), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["cps", "ddim_eta"])
def test_the_last_step_has_no_noise(name: str) -> None:
    x, v = torch.randn(2, 2, 6, generator=torch.Generator().manual_seed(4))
    t, end = torch.tensor([0.2, 1.0]), torch.zeros(2)
    mean, std = make_kernel(name, PROCESS, 0.8, 10).moments(v, x, t, end)
    assert not std.any()
    torch.testing.assert_close(mean, x - t[:, None] * v)


@pytest.mark.parametrize("name", NAMES)
def test_moments_are_fp32_and_per_row(name: str) -> None:
    kernel = make_kernel(name, PROCESS, 0.5, 10)
    x, v = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    t, t_next = torch.tensor([0.9, 0.5, 0.3]), torch.tensor([0.8, 0.2, 0.1])
    mean, std = kernel.moments(v.bfloat16(), x, t, t_next)
    assert (mean.dtype, std.dtype, mean.shape, std.shape) == (torch.float32, torch.float32, x.shape, (3,))
    mean, std = kernel.moments(v, x, t, t_next)
    for i in range(3):
        row, row_std = kernel.moments(v[i : i + 1], x[i : i + 1], t[i : i + 1], t_next[i : i + 1])
        torch.testing.assert_close((mean[i], std[i]), (row[0], row_std[0]))


def test_an_unknown_kernel_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown step kernel 'euler'; known: ancestral, constant_sde, cps, ddim_eta, edm_2ab, edm_euler, flow_sde"):
        make_kernel("euler", PROCESS, 0.5, 10)


# -- log-densities --------------------------------------------------------------------------------------------------


def transition() -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(6)
    return torch.randn(4, 3, 2, 2, generator=g), torch.randn(4, 3, 2, 2, generator=g), torch.tensor([0.01, 0.1, 0.7, 3.0])


def test_exact_log_prob_is_the_normals_mean_over_entries() -> None:
    x_next, mean, std = transition()
    expected = Normal(mean, std.reshape(-1, 1, 1, 1).expand_as(mean)).log_prob(x_next).mean((1, 2, 3))
    torch.testing.assert_close(log_prob(x_next, mean, std).float(), expected)


def test_the_other_scalings_are_the_quadratic_part_times_a_factor() -> None:
    x_next, mean, std = transition()
    other = transition()[0] + 0.3
    exact = log_prob(x_next, mean, std) - log_prob(other, mean, std)
    for scaling, factor in (("unscaled", 2 * std**2), ("std_weighted", std)):
        difference = log_prob(x_next, mean, std, scaling) - log_prob(other, mean, std, scaling)
        torch.testing.assert_close(difference, exact * factor.double(), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(log_prob(x_next, mean, std, "unscaled").float(), -(x_next - mean).square().mean((1, 2, 3)))


def test_an_unknown_scaling_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown log-prob scaling 'sum'; known: exact, unscaled, std_weighted"):
        log_prob(*transition(), "sum")
