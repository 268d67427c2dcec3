"""Settings of the model and the sampler."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from diffusion.config import ModelConfig, SamplerConfig


@given(steps=st.integers(2, 30), trained=st.integers(-2, 40))
def test_the_number_of_trained_steps_leaves_out_the_last(steps: int, trained: int) -> None:
    fits = 1 <= trained <= steps - 1
    try:
        SamplerConfig(steps=steps, trained_steps=trained)
    except ValidationError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize("steps", [[], [0, 0], [9], [-1], [0, 12]])
def test_listed_trained_steps_are_distinct_and_not_the_last(steps: list[int]) -> None:
    with pytest.raises(ValidationError, match=r"must be distinct indices in 0..8 \(steps=10, the last step is never trained\)"):
        SamplerConfig(steps=10, trained_steps=steps)


def test_listed_trained_steps_that_fit() -> None:
    assert SamplerConfig(steps=10, trained_steps=[8, 0]).trained_steps == [8, 0]


@pytest.mark.parametrize("bad", [{"noise_level": 0}, {"noise_level": 2.5}, {"steps": 1}, {"kernel": "euler"}, {"noise_on": "some"}, {"stepz": 3}])
def test_sampler_refusals(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplerConfig(**bad)


@pytest.mark.parametrize("bad", [{"attention": "flash"}, {"dtype": "float16"}, {"pathh": "x"}])
def test_model_refusals(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ModelConfig(**bad)


def test_settings_do_not_change_after_reading() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        SamplerConfig().steps = 3  # type: ignore[misc]


@pytest.mark.parametrize("kernel", ["edm_2ab", "edm_euler"])
def test_churn_kernels_train_all_but_the_last_two_steps(kernel: Any) -> None:
    assert SamplerConfig(kernel=kernel, noise_level=5.0, steps=21, trained_steps=list(range(0, 20, 2)))
    assert SamplerConfig(kernel=kernel, steps=21, trained_steps=19)
    with pytest.raises(ValidationError, match=rf"must lie in 1..19: steps=21 and the last two steps of {kernel} draw no noise"):
        SamplerConfig(kernel=kernel, steps=21, trained_steps=20)
    with pytest.raises(ValidationError, match=r"must be distinct indices in 0..18"):
        SamplerConfig(kernel=kernel, steps=21, trained_steps=[19])
    with pytest.raises(ValidationError, match="steps=2 leaves nothing to train"):
        SamplerConfig(kernel=kernel, steps=2, trained_steps=1)


@pytest.mark.parametrize(
    "bad", [{"kernel": "ancestral", "noise_level": 1.2}, {"kernel": "cps", "noise_level": 1.2}, {"noise_level": 2.1}, {"guidance": 0.5}, {"guidance": -1}]
)
def test_refused_noise_and_guidance(bad: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SamplerConfig(**bad)
