"""Forward processes: noising, target and split agree; grids and training times; what a diffusers folder says."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion.processes import EDM, ForwardProcess, RectifiedFlow, VariancePreserving, bcast, process_from_scheduler

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


# -- sigma space and the table of noise levels ---------------------------------------------------------------------

ALL: list[ForwardProcess] = [
    RectifiedFlow(3.0),
    EDM(),
    EDM(sigma_data=1.0, prediction="v_prediction"),
    EDM.of_flow(RectifiedFlow(3.0)),
    VariancePreserving(),
    VariancePreserving("scaled_linear", 0.00085, 0.012, prediction="v_prediction"),
]
NAMED = [f"{p.name}{i}" for i, p in enumerate(ALL)]


@pytest.mark.parametrize("process", ALL, ids=NAMED)
def test_every_process_reads_its_own_target(process: ForwardProcess) -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps, _ = draw(64)
    t = process.sample_times(64, g)
    assert (t > 0).all()
    a, s = process.coefficients(t)
    x = process.noise(x0, eps, t)
    torch.testing.assert_close(x, bcast(a, x0) * x0 + bcast(s, x0) * eps)
    target = process.target(x0, eps, t)
    back, noise = process.split(target, x, t)
    # an error of the state reaches x0 over the data's share, eps over the noise's
    assert float((bcast(a, x0) * (back - x0)).abs().max()) < 1e-5 * float(1 + s.max())
    assert float((bcast(s, x0) * (noise - eps)).abs().max()) < 1e-5 * float(1 + s.max())
    assert not process.loss(target, x0, eps, t).any()
    assert float(process.loss(target + 0.5, x0, eps, t).mean()) == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("process", ALL, ids=NAMED)
@pytest.mark.parametrize("steps", [1, 2, 20])
def test_every_grid_falls_to_clean_data(process: ForwardProcess, steps: int) -> None:
    grid = process.time_grid(steps)
    assert (grid.shape, grid.dtype) == ((steps + 1,), torch.float32)
    assert (grid.diff() < 0).all()
    a, s = process.coefficients(grid[-1:])
    assert (float(a), float(s)) == (1, 0)


def test_a_flow_policy_in_sigma_space_is_the_same_policy() -> None:
    """Same network input, same time, same estimates, same loss: only the state's scale differs."""
    flow, edm = RectifiedFlow(2.0), EDM.of_flow(RectifiedFlow(2.0))
    x0, eps, _ = draw(9)
    t = torch.linspace(0.02, 0.98, 9)
    sigma = t / (1 - t)
    x, wide = flow.noise(x0, eps, t), edm.noise(x0, eps, sigma)
    torch.testing.assert_close(edm.model_input(wide, sigma), x, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(edm.model_time(sigma), t)
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    for one, other in zip(flow.split(v, x, t), edm.split(v, wide, sigma), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edm.loss(v, x0, eps, sigma), flow.loss(v, x0, eps, t))
    g = torch.Generator
    levels = edm.sample_times(4000, g().manual_seed(3))
    torch.testing.assert_close(edm.model_time(levels), flow.sample_times(4000, g().manual_seed(3)), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_edm_preconditioning_is_diffusers(prediction: Literal["epsilon", "v_prediction"]) -> None:
    theirs = EDMEulerScheduler(prediction_type=prediction)
    process = process_from_scheduler(dict(theirs.config) | {"_class_name": "EDMEulerScheduler"})
    x, f = torch.randn(2, 1, 6, generator=torch.Generator().manual_seed(0))
    for sigma in (0.01, 0.7, 40.0):
        t = torch.tensor([sigma])
        torch.testing.assert_close(process.split(f, x, t)[0], theirs.precondition_outputs(x, f, sigma), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(process.model_input(x, t), theirs.precondition_inputs(x, sigma))
        torch.testing.assert_close(1000 * process.model_time(t), theirs.precondition_noise(t))
    theirs.set_timesteps(12)
    torch.testing.assert_close(process.time_grid(12), theirs.sigmas.float(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["linear", "scaled_linear"])
def test_the_table_of_noise_levels_is_diffusers(schedule: str, prediction: str) -> None:
    theirs = DDIMScheduler(beta_schedule=schedule, beta_start=0.00085, beta_end=0.012, prediction_type=prediction)  # type: ignore[arg-type]
    process = process_from_scheduler(dict(theirs.config) | {"_class_name": "DDIMScheduler"})
    x0, eps, _ = draw(4)
    index = torch.tensor([0, 10, 500, 999])
    t = (index + 1) / 1000
    torch.testing.assert_close(1000 * process.model_time(t), index.float())
    torch.testing.assert_close(process.noise(x0, eps, t), theirs.add_noise(x0, eps, index), atol=1e-5, rtol=1e-4)
    expected = eps if prediction == "epsilon" else theirs.get_velocity(x0, eps, index)
    torch.testing.assert_close(process.target(x0, eps, t), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("values", "kind", "shift"),
    [
        ({}, RectifiedFlow, 1.0),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, "use_dynamic_shifting": False}, RectifiedFlow, 3.0),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 5.0},
            RectifiedFlow,
            5.0,
        ),
        ({"_class_name": "EDMEulerScheduler", "sigma_max": 100}, EDM, None),
        ({"_class_name": "DDPMScheduler"}, VariancePreserving, None),
        ({"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "trained_betas": None}, VariancePreserving, None),
    ],
)
def test_processes_of_scheduler_files(values: dict[str, Any], kind: type[ForwardProcess], shift: float | None) -> None:
    process = process_from_scheduler(values)
    assert type(process) is kind
    if isinstance(process, RectifiedFlow):
        assert process.shift == shift
    if isinstance(process, EDM):
        assert (process.sigma_max, process.preconditioning) == (100, "edm")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"_class_name": "LCMScheduler"}, "unknown scheduler 'LCMScheduler'; known: FlowMatch"),
        ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True is not supported"),
        ({"_class_name": "UniPCMultistepScheduler"}, "flow policies only"),
        ({"_class_name": "DDPMScheduler", "beta_schedule": "squaredcos_cap_v2"}, "unknown beta schedule"),
        ({"_class_name": "DDPMScheduler", "prediction_type": "sample"}, "unknown prediction 'sample'"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "rescale_betas_zero_snr=True is not supported"),
        ({"_class_name": "DDIMScheduler", "beta_start": 0.0}, "0 < beta_start"),
        ({"_class_name": "EDMEulerScheduler", "sigma_min": 0}, "0 < sigma_min < sigma_max"),
        ({"_class_name": "EDMEulerScheduler", "rho": -1}, "must be positive"),
        ({"_class_name": "EDMEulerScheduler", "prediction_type": "sample"}, "unknown prediction 'sample'"),
    ],
)
def test_schedulers_that_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        process_from_scheduler(values)


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("steps", [1, 2, 10, 28, 40])
@pytest.mark.parametrize("levels", [1000, 100])
def test_the_grid_of_diffusers_is_its_schedulers(shift: float, steps: int, levels: int) -> None:
    theirs = FlowMatchEulerDiscreteScheduler(num_train_timesteps=levels, shift=shift)
    theirs.set_timesteps(steps)
    process = process_from_scheduler(dict(theirs.config), "diffusers")
    found = process.time_grid(steps)
    torch.testing.assert_close(found, theirs.sigmas, atol=1e-6, rtol=0)
    assert found[0] == 1
    assert found[-1] == 0
    default = process_from_scheduler(dict(theirs.config))
    assert isinstance(default, RectifiedFlow)
    assert default.grid == "even"
    assert steps == 1 or not torch.allclose(default.time_grid(steps), found, atol=1e-3)


def test_the_published_grid_of_sd3() -> None:
    """Shift 3, 10 steps: the lower end is shifted twice."""
    found = RectifiedFlow(3.0, "diffusers").time_grid(10)
    torch.testing.assert_close(found[[0, 1, 2, 3, -4, -3, -2, -1]], torch.tensor([1, 0.9601, 0.9133, 0.8577, 0.4649, 0.2780, 0.0089, 0]), atol=5e-5, rtol=0)


@pytest.mark.parametrize("key", ["shift_terminal", "use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "invert_sigmas"])
def test_a_grid_that_is_asked_for_and_not_there_is_refused(key: str) -> None:
    values = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0, key: 0.1 if key == "shift_terminal" else True}
    process_from_scheduler(values)
    with pytest.raises(ValueError, match=f"{key}=.* is not supported"):
        process_from_scheduler(values, "diffusers")
    with pytest.raises(ValueError, match=r"model\.grid=diffusers is that of a FlowMatchEuler.*, this is a DDPMScheduler"):
        process_from_scheduler({"_class_name": "DDPMScheduler"}, "diffusers")


def test_more_steps_than_noise_levels_are_refused() -> None:
    with pytest.raises(ValueError, match="11 steps exceed the 10 noise levels"):
        VariancePreserving(train_steps=10).time_grid(11)


def test_fixed_points_of_the_held_out_loss_cover_the_levels_of_training() -> None:
    u = (torch.arange(1000) + 0.5) / 1000
    assert torch.equal(RectifiedFlow(2.0).spread_times(u), u.clamp(1e-3, 1 - 1e-3))
    drawn = EDM().sample_times(20_000, torch.Generator().manual_seed(0)).log()
    spread = EDM().spread_times(u).log()
    torch.testing.assert_close(torch.stack([spread.mean(), spread.std()]), torch.stack([drawn.mean(), drawn.std()]), atol=0.03, rtol=0)
    steps = VariancePreserving(train_steps=50).spread_times(u) * 50
    assert steps.round().long().bincount().tolist() == [0] + [20] * 50
