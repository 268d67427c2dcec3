"""Rectified flow: noising, target and split agree; grids and training times."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.processes import RectifiedFlow, bcast

SHIFTS = st.sampled_from([0.5, 1.0, 2.0, 3.0, 6.0])


def draw(n: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 4, 5, generator=g), torch.randn(n, 3, 4, 5, generator=g), torch.rand(n, generator=g)


@given(shift=SHIFTS, seed=st.integers(0, 99))
def test_the_exact_velocity_recovers_data_and_noise(shift: float, seed: int) -> None:
    process = RectifiedFlow(shift)
    x0, eps, t = draw(seed=seed)
    x = process.noise(x0, eps, t)
    back, noise = process.split(process.target(x0, eps, t), x, t)
    torch.testing.assert_close(back, x0, atol=1e-5, rtol=0)
    torch.testing.assert_close(noise, eps, atol=1e-5, rtol=0)


def test_time_runs_from_noise_to_data() -> None:
    process = RectifiedFlow(2.0)
    x0, eps, _ = draw(2)
    assert torch.equal(process.noise(x0, eps, torch.ones(2)), eps)
    assert torch.equal(process.noise(x0, eps, torch.zeros(2)), x0)


def test_the_velocity_is_the_derivative_of_noising() -> None:
    process = RectifiedFlow()
    x0, eps, t = draw()
    d = 1e-2
    slope = (process.noise(x0, eps, t + d) - process.noise(x0, eps, t)) / d
    torch.testing.assert_close(slope, process.target(x0, eps, t), atol=1e-3, rtol=0)


def test_loss_is_the_mean_squared_error_of_the_velocity() -> None:
    process = RectifiedFlow(2.0)
    x0, eps, t = draw()
    assert torch.equal(process.loss(eps - x0, x0, eps, t), torch.zeros(6))
    torch.testing.assert_close(process.loss(eps - x0 + 0.5, x0, eps, t), torch.full((6,), 0.25))


def test_low_precision_predictions_are_read_in_fp32() -> None:
    process = RectifiedFlow()
    x0, eps, t = draw()
    low = (eps - x0).bfloat16()
    parts = (*process.split(low, x0.bfloat16(), t), process.noise(x0.bfloat16(), eps, t), process.loss(low, x0, eps, t))
    assert {p.dtype for p in parts} == {torch.float32}


@given(shift=SHIFTS, steps=st.integers(1, 200))
def test_time_grid(shift: float, steps: int) -> None:
    grid = RectifiedFlow(shift).time_grid(steps)
    assert grid.shape == (steps + 1,)
    assert (grid[0], grid[-1]) == (1.0, 0.0)
    assert (grid.diff() < 0).all()
    u = torch.linspace(1, 0, steps + 1)
    torch.testing.assert_close(grid, shift * u / (1 + (shift - 1) * u), atol=1e-6, rtol=0)


@given(shift=SHIFTS)
@settings(max_examples=5)
def test_training_times_follow_the_shifted_logit_normal(shift: float) -> None:
    times = RectifiedFlow(shift).sample_times(20_000, torch.Generator().manual_seed(0))
    assert ((times > 0) & (times < 1)).all()
    u = times / (shift - (shift - 1) * times)  # the shift undone
    logit = torch.logit(u.double())
    assert abs(float(logit.mean())) < 0.03
    assert abs(float(logit.std()) - 1) < 0.03


@pytest.mark.parametrize("shift", [0.0, -1.0])
def test_a_shift_must_be_positive(shift: float) -> None:
    with pytest.raises(ValueError, match="shift must be positive"):
        RectifiedFlow(shift)


def test_bcast_adds_trailing_dimensions() -> None:
    t = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert bcast(t, torch.zeros(2, 3, 4)).shape == (2, 1, 1)
    assert bcast(t, torch.zeros(2)).dtype == torch.float32
