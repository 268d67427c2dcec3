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


@pytest.mark.parametrize("bad", [{"noise_level": 0}, {"noise_level": 2.5}, {"steps": 1}, {"kernel": "euler"}, {"noise_on": "none"}, {"stepz": 3}])
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
