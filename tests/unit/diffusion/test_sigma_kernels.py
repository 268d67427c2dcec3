"""Kernels in sigma space, and the kernels of any process, against independent forms."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion.kernel_names import KERNEL_NAMES, stochastic_steps
from diffusion.kernels import MIN_STD, Previous, StepKernel, log_prob, make_kernel
from diffusion.processes import EDM, ForwardProcess, RectifiedFlow, VariancePreserving, karras_nodes

FLOW = RectifiedFlow()
SIGMA_KERNELS = ["edm_euler", "edm_2ab", "ancestral"]


def no_previous(x: Tensor) -> Previous:
    return Previous(torch.zeros_like(x), torch.full((len(x),), math.inf))


def denoised(x: Tensor, sigma: Tensor, s: float) -> Tensor:
    """E[x0 | x] for data N(0, s²)."""
    return x * (s**2 / (s**2 + sigma.reshape(-1, 1) ** 2))


def prediction_of(process: ForwardProcess, x0: Tensor, x: Tensor, t: Tensor) -> Tensor:
    """The network output that `split` reads as `x0`: the target of the noise that leads from `x0` to `x`."""
    a, s = process.coefficients(t)
    return process.target(x0, (x - a[:, None] * x0) / s[:, None], t)


def integrate(kernel: StepKernel, steps: int, s: float, x: Tensor) -> Tensor:
    """The kernel's deterministic solver from `x` `[n, 1]` down its whole grid, with the exact denoiser of data N(0, s²)."""
    grid, previous = kernel.time_grid(steps), no_previous(x)
    for i in range(steps):
        t, t_next = grid[i : i + 1].expand(len(x)), grid[i + 1 : i + 2].expand(len(x))
        x0 = denoised(x, t, s)
        x, previous = kernel.ode(prediction_of(kernel.process, x0, x, t), x, t, t_next, previous), Previous(x0, t)
    return x


# -- the public DDRL sampler --------------------------------------------------------------------------------------------

# step, lifted sigma, flow time, weight of x0, std, 2 std w, w/std: recomputed from the public configuration
PUBLIC = [
    (0, 209.5, 0.995, 0.27, 47.7, 25.9, 0.0057),
    (2, 120.8, 0.992, 0.47, 26.9, 25.3, 0.018),
    (4, 66.4, 0.985, 0.50, 14.4, 14.4, 0.035),
    (6, 34.5, 0.972, 0.54, 7.24, 7.8, 0.074),
    (8, 16.8, 0.944, 0.58, 3.38, 3.9, 0.17),
    (10, 7.50, 0.882, 0.63, 1.44, 1.8, 0.44),
    (12, 3.02, 0.751, 0.69, 0.545, 0.76, 1.3),
    (14, 1.06, 0.515, 0.77, 0.176, 0.27, 4.4),
    (16, 0.311, 0.237, 0.88, 0.046, 0.080, 19),
    (18, 0.070, 0.065, 1.02, 0.0086, 0.018, 119),
]


@pytest.mark.parametrize(("step", "sigma", "time", "weight", "std", "unscaled", "exact"), PUBLIC)
def test_the_steps_of_the_public_ddrl_sampler(step: int, sigma: float, time: float, weight: float, std: float, unscaled: float, exact: float) -> None:
    """20 public steps are 21 here. The weight of x0 is measured as the slope of the mean, not read from the kernel."""
    kernel = make_kernel("edm_2ab", FLOW, 1.0, 21)
    grid = kernel.time_grid(21)
    assert float(grid[step]) == pytest.approx(sigma, rel=5e-3)
    t, t_next = grid[step : step + 1], grid[step + 1 : step + 2]
    assert float(kernel.process.model_time(t)) == pytest.approx(time, abs=1e-3)
    x = torch.zeros(1, 1)
    previous = Previous(x, grid[step - 1 : step]) if step else no_previous(x)
    ends = [kernel.moments(prediction_of(kernel.process, x0, x, t), x, t, t_next, previous) for x0 in (torch.zeros(1, 1), torch.ones(1, 1))]
    measured, deviation = float(ends[1][0] - ends[0][0]), float(ends[0][1])
    assert measured == pytest.approx(weight, abs=6e-3)
    assert deviation == pytest.approx(std, rel=6e-3)
    assert 2 * deviation * measured == pytest.approx(unscaled, rel=3e-2)
    assert measured / deviation == pytest.approx(exact, rel=3e-2)


def test_the_churned_grid() -> None:
    kernel = make_kernel("edm_2ab", FLOW, 1.0, 21)
    grid = kernel.time_grid(21).double()
    nodes = [(200 ** (1 / 7) + i / 20 * (0.01 ** (1 / 7) - 200 ** (1 / 7))) ** 7 for i in range(21)]
    expected = [*(node * (1 + 1 / 21) for node in nodes[:-1]), 0.01, 0.0]
    torch.testing.assert_close(grid, torch.tensor(expected, dtype=torch.float64), atol=0, rtol=1e-6)
    assert (grid.diff() < 0).all()
    with pytest.raises(ValueError, match="is for 21 steps, not 20"):
        kernel.time_grid(20)


def test_noise_lifts_a_state_to_the_next_node() -> None:
    """Landing on sigma' and adding the noise must give the variance of the lifted node: sigma'² + std² = ((1+eta) sigma')²."""
    for name in ("edm_euler", "edm_2ab"):
        kernel = make_kernel(name, FLOW, 1.5, 12)
        grid = kernel.time_grid(12)
        t, t_next = grid[:10], grid[1:11]
        x0, eps = torch.full((10, 1), 0.3), torch.full((10, 1), -1.1)
        x = kernel.process.noise(x0, eps, t)
        previous = Previous(x0, torch.cat([torch.tensor([math.inf]), grid[:9]]))
        mean, std = kernel.moments(kernel.process.target(x0, eps, t), x, t, t_next, previous)
        landed = (mean - x0)[:, 0] / eps[:, 0]
        torch.testing.assert_close(landed**2 + std**2, t_next**2, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["edm_euler", "edm_2ab"])
def test_the_last_two_steps_of_a_churn_kernel_are_deterministic(name: str) -> None:
    kernel = make_kernel(name, FLOW, 1.0, 8)
    grid = kernel.time_grid(8)
    t, t_next = grid[-3:-1], grid[-2:]
    x, x0 = torch.tensor([[0.5], [0.5]]), torch.tensor([[0.2], [0.2]])
    prediction = prediction_of(kernel.process, x0, x, t)
    previous = Previous(torch.zeros(2, 1), grid[-4:-2])
    mean, std = kernel.moments(prediction, x, t, t_next, previous)
    assert not std.any()
    torch.testing.assert_close(mean, kernel.ode(prediction, x, t, t_next, previous))
    torch.testing.assert_close(mean[1], x0[1])  # the clean-up is the prediction of x0


def test_two_step_solver_against_the_exponential_integral() -> None:
    """x0 linear in log-sigma between the two predictions and beyond: the step is then exact, here by quadrature."""
    kernel = make_kernel("edm_2ab", FLOW, 1.0, 21)
    before, now, then = 3.0, 1.7, 0.9
    slope, level = 0.8, -0.4
    forcing = lambda log_sigma: level + slope * log_sigma  # noqa: E731
    u = torch.linspace(math.log(now), math.log(then), 200_001, dtype=torch.float64)
    # d(x/sigma)/d log sigma = -x0/sigma
    integral = torch.trapezoid(-forcing(u) * (-u).exp(), u)
    x = 2.2
    expected = then * (x / now + float(integral))
    state, t = torch.tensor([[x]]), torch.tensor([now])
    x0 = torch.tensor([[forcing(math.log(now))]])
    previous = Previous(torch.tensor([[forcing(math.log(before))]]), torch.tensor([before]))
    got = kernel.ode(prediction_of(kernel.process, x0, state, t), state, t, torch.tensor([then]), previous)
    assert float(got) == pytest.approx(expected, rel=1e-5)


def test_a_first_step_of_the_two_step_solver_is_eulers() -> None:
    one, two = make_kernel("edm_euler", FLOW, 1.0, 21), make_kernel("edm_2ab", FLOW, 1.0, 21)
    grid = one.time_grid(21)
    x, prediction = torch.randn(2, 20, 5, generator=torch.Generator().manual_seed(0))
    for a, b in zip(one.moments(prediction, x, grid[:20], grid[1:21]), two.moments(prediction, x, grid[:20], grid[1:21], no_previous(x)), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="edm_2ab needs the previous prediction"):
        two.moments(prediction, x, grid[:20], grid[1:21])


def test_the_two_step_solver_converges_faster_than_eulers() -> None:
    """Doubling the steps halves Euler's error and quarters the two-step solver's."""
    s, x = 0.5, torch.tensor([[150.0]])
    errors: dict[str, list[float]] = {}
    for name in ("edm_euler", "edm_2ab"):
        for steps in (41, 81):
            kernel = make_kernel(name, FLOW, 1e-9, steps)
            first = float(kernel.time_grid(steps)[0])
            # the exact flow keeps x / √(s² + sigma²); sigma_min is far below s, so the clean-up ends there too
            exact = 150.0 * s / math.sqrt(s**2 + first**2)
            errors.setdefault(name, []).append(abs(float(integrate(kernel, steps, s, x)) - exact) / exact)
    euler, two_step = errors["edm_euler"], errors["edm_2ab"]
    assert euler[0] / euler[1] == pytest.approx(2, rel=0.15)
    assert two_step[0] / two_step[1] > 3.2
    assert two_step[1] < euler[1] / 5


def marginal_error(name: str, steps: int, s: float) -> tuple[float, float]:
    """Relative error of the variance, at its largest on the way and at the end, of a stochastic trajectory for data N(0, s²).

    Steps are linear in the pair (x, previous x0), so its covariance is followed exactly, without sampling.
    """
    kernel = make_kernel(name, FLOW, 1.0, steps)
    grid = kernel.time_grid(steps)
    covariance = torch.zeros(2, 2, dtype=torch.float64)
    covariance[0, 0] = float(grid[0]) ** 2 + s**2
    errors = []
    for i in range(steps):
        t, t_next = grid[i : i + 1].expand(2), grid[i + 1 : i + 2].expand(2)
        x, older = torch.eye(2).split(1, 1)
        x0 = denoised(x, t, s)
        previous = Previous(older, grid[i - 1 : i].expand(2)) if i else no_previous(x)
        mean, std = kernel.moments(prediction_of(kernel.process, x0, x, t), x, t, t_next, previous)
        step = torch.cat([mean, x0], 1).T.double()
        covariance = step @ covariance @ step.T
        covariance[0, 0] += float(std[0]) ** 2
        wanted = s**2 + float(grid[i + 1]) ** 2
        errors.append(abs(float(covariance[0, 0]) - wanted) / wanted)
    return max(errors), errors[-1]


@pytest.mark.parametrize("name", SIGMA_KERNELS)
@pytest.mark.parametrize("s", [0.3, 1.0])
def test_a_stochastic_trajectory_in_sigma_space_keeps_the_marginals(name: str, s: float) -> None:
    (coarse, _), (fine, end) = marginal_error(name, 81, s), marginal_error(name, 161, s)
    assert fine < 0.09
    assert end < 0.09
    assert fine < 0.65 * coarse  # first order at least


def test_the_ancestral_step_is_edms() -> None:
    """Against the sigma-space form: mean = x̂0 + (s'²/s²)(x - x̂0), std = √(s'²(s² - s'²)/s²)."""
    kernel = make_kernel("ancestral", FLOW, 1.0, 10)
    x, x0 = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    t, t_next = torch.tensor([2.0]), torch.tensor([0.7])
    mean, std = kernel.moments(prediction_of(kernel.process, x0, x, t), x, t, t_next)
    torch.testing.assert_close(mean, x0 + 0.49 / 4 * (x - x0), atol=1e-5, rtol=1e-5)
    assert float(std) == pytest.approx(math.sqrt(0.49 * (4 - 0.49) / 4))


def test_start_is_the_first_nodes_noise() -> None:
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(make_kernel("flow_sde", FLOW, 0.7, 10).start(noise), noise)
    torch.testing.assert_close(make_kernel("ancestral", FLOW, 1.0, 10).start(noise), 200 * noise)
    torch.testing.assert_close(make_kernel("edm_2ab", FLOW, 1.0, 21).start(noise), 200 * (1 + 1 / 21) * noise)
    torch.testing.assert_close(make_kernel("ddim_eta", EDM(), 1.0, 10).start(noise), 80 * noise)


# -- the kernels of any process --------------------------------------------------------------------------------------


@given(k=st.integers(2, 1000), fraction=st.floats(0, 0.99), eta=st.floats(0.05, 1), prediction=st.sampled_from(["epsilon", "v_prediction"]))
def test_ddim_of_a_variance_preserving_policy(k: int, fraction: float, eta: float, prediction: str) -> None:
    """The DDIM paper's form, equations 12 and 16, from alpha-bar alone."""
    process = VariancePreserving("scaled_linear", 0.00085, 0.012, prediction=prediction)  # type: ignore[arg-type]
    k_next = int(k * fraction)
    now, then = (float(process.alpha_bar[i]) for i in (k, k_next))
    t, t_next = torch.tensor([k / 1000]), torch.tensor([k_next / 1000])
    x0, eps = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    x = process.noise(x0, eps, t)
    mean, std = make_kernel("ddim_eta", process, eta, 10).moments(process.target(x0, eps, t), x, t, t_next)
    sigma = eta * math.sqrt((1 - then) / (1 - now) * (1 - now / then))
    assert float(std) == pytest.approx(sigma, rel=2e-3, abs=1e-6)
    torch.testing.assert_close(mean, math.sqrt(then) * x0 + math.sqrt(max(0.0, 1 - then - sigma**2)) * eps, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("process", [FLOW, EDM(), EDM.of_flow(FLOW), VariancePreserving()], ids=["flow", "edm", "edm of a flow", "vp"])
@pytest.mark.parametrize("name", ["cps", "ddim_eta"])
def test_marginal_kernels_keep_the_noise_level_of_every_process(name: str, process: ForwardProcess) -> None:
    kernel = make_kernel(name, process, 0.6, 10)
    grid = kernel.time_grid(10)
    x0, eps = torch.full((10, 1), 0.4), torch.full((10, 1), -0.9)
    x = process.noise(x0, eps, grid[:-1])
    mean, std = kernel.moments(process.target(x0, eps, grid[:-1]), x, grid[:-1], grid[1:])
    a, s = process.coefficients(grid[1:])
    left = (mean[:, 0] - a * 0.4) / -0.9
    torch.testing.assert_close(left**2 + std**2, s**2, atol=1e-4, rtol=2e-3)
    assert float(std[-1]) == 0


@pytest.mark.parametrize("name", KERNEL_NAMES)
@pytest.mark.parametrize("steps", [10, 21])
def test_stochastic_steps_draw_noise_and_the_rest_do_not(name: str, steps: int) -> None:
    kernel = make_kernel(name, FLOW, 0.9, steps)
    grid, count = kernel.time_grid(steps), stochastic_steps(name, steps)
    assert (len(grid), float(grid[-1])) == (steps + 1, 0)
    assert count == steps - (2 if name.startswith("edm_") else 1)
    x = torch.zeros(steps, 1)
    _, std = kernel.moments(x, x, grid[:-1], grid[1:], Previous(x, torch.cat([torch.tensor([math.inf]), grid[:-2]])))
    assert (std[:count] > 10 * MIN_STD).all()
    if name not in ("flow_sde", "constant_sde"):  # their formula has noise there; the engine takes the ODE step
        assert not std[count:].any()


@pytest.mark.parametrize("name", KERNEL_NAMES)
def test_a_step_is_a_density(name: str) -> None:
    """Over one latent entry, exp(log_prob) integrates to 1 and has the kernel's mean and deviation."""
    kernel = make_kernel(name, FLOW, 0.5, 10)
    grid = kernel.time_grid(10)
    t, t_next = grid[6:7], grid[7:8]
    x = torch.tensor([[0.7]])
    mean, std = kernel.moments(torch.tensor([[0.3]]), x, t, t_next, Previous(torch.tensor([[0.1]]), grid[5:6]))
    points = mean[0] + float(std) * torch.linspace(-9, 9, 4001)
    density = log_prob(points[:, None], mean.expand(4001, 1), std.expand(4001)).exp().double()
    integral = lambda f: float(torch.trapezoid(f * density, points.double()))  # noqa: E731
    assert integral(torch.ones(4001)) == pytest.approx(1, abs=1e-4)
    assert integral(points - float(mean)) == pytest.approx(0, abs=1e-4 * float(std) + 1e-6)
    assert math.sqrt(integral((points - float(mean)) ** 2)) == pytest.approx(float(std), rel=1e-3)


def test_kernels_refuse_policies_they_do_not_fit() -> None:
    for name in ("flow_sde", "constant_sde"):
        with pytest.raises(ValueError, match=f"{name} is a rectified flow's; for a policy of process edm"):
            make_kernel(name, EDM(), 0.5, 10)
    for name in SIGMA_KERNELS:
        with pytest.raises(ValueError, match=f"{name} needs a rectified-flow or EDM policy; for process variance_preserving"):
            make_kernel(name, VariancePreserving(), 0.5, 10)
        edm = EDM(sigma_max=30.0)
        assert make_kernel(name, edm, 0.5, 10).process is edm
    with pytest.raises(ValueError, match="edm_2ab needs at least 3 steps, got 2"):
        make_kernel("edm_2ab", FLOW, 1.0, 2)


def test_churn_is_bounded() -> None:
    kernel = make_kernel("edm_euler", FLOW, 100.0, 10)
    grid = kernel.time_grid(10)
    assert float(grid[0]) == pytest.approx(200 * math.sqrt(1.2))
    assert float(karras_nodes(10, 200, 0.01, 7)[1]) * math.sqrt(1.2) == pytest.approx(float(grid[1]))
