"""Moments in 8 bits: codes, the step against torch's AdamW, memory, checkpoints."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.gloo import alone
from tests.unit.trainer.learn.test_learner import LORA, batch_of, config_of, difference, learner_of
from trainer.config.learner import OptimizerConfig, scales
from trainer.learn.checkpoint import save_shards
from trainer.learn.optimizer import AdamW8bit, decode, encode, make_optimizer, table

CPU = torch.device("cpu")
LOW = {"lr": 1e-2, "kind": "adamw8bit"}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


@pytest.mark.parametrize("signed", [True, False])
def test_the_table(signed: bool) -> None:
    numbers = table(signed, CPU)
    assert len(numbers) == len(set(numbers.tolist())) == 256
    assert torch.equal(numbers, numbers.sort().values)
    assert (numbers[-1], (numbers == 0).sum(), (numbers < 0).sum()) == (1, 1, 127 if signed else 0)
    assert numbers[-2] == pytest.approx(1 - 0.45 / (64 if signed else 128))  # the middle of the last part of [0.1, 1]


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(0, 4), row=st.integers(1, 600), signed=st.booleans(), seed=st.integers(0, 1000))
def test_codes_are_those_of_the_nearest_numbers_block_by_block(rows: int, row: int, signed: bool, seed: int) -> None:
    values = torch.randn(rows, row, generator=torch.Generator().manual_seed(seed)) ** 3
    values = values if signed else values.abs()
    codes, scale = encode(values, signed)
    assert (codes.shape, codes.dtype, scale.shape) == (values.shape, torch.uint8, (rows, -(-row // 256)))
    each = scale.repeat_interleave(256, 1)[:, :row].double()  # in units of it rounding is the same for every block
    nearest = ((values.double() / each)[..., None] - table(signed, CPU).double()).abs().amin(-1)
    torch.testing.assert_close((decode(codes, scale, signed).double() - values).abs() / each, nearest, rtol=1e-4, atol=5e-7)


def test_a_block_of_zeros_stays_zeros() -> None:
    codes, scale = encode(torch.zeros(2, 300), True)
    assert torch.equal(decode(codes, scale, True), torch.zeros(2, 300))


def test_who_is_held_in_8_bits() -> None:
    assert scales((16, 256)) == (16, 1)
    assert scales((16, 257)) == (16, 2)
    assert scales((8, 16, 8, 8)) == (8, 4)
    assert scales((4096,)) is None  # biases and norms
    assert scales((15, 256)) is None
    assert scales((4096, 31)) is None


def trained(kind: str, steps: int) -> tuple[list[torch.Tensor], torch.optim.Optimizer]:
    """A matrix and its bias after steps on a least-squares problem."""
    g = torch.Generator().manual_seed(0)
    weights, target, inputs = torch.randn(64, 96, generator=g), torch.randn(64, 96, generator=g), torch.randn(200, 96, generator=g)
    parameters = [torch.nn.Parameter(weights), torch.nn.Parameter(torch.zeros(64))]
    optimizer = make_optimizer(OptimizerConfig.model_validate({"kind": kind, "lr": 2e-2, "weight_decay": 0.1}), parameters)
    for _ in range(steps):
        (inputs @ (parameters[0] - target).T + parameters[1]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in parameters], optimizer


def test_the_first_step_is_that_of_adamw() -> None:
    """Nothing was decoded yet."""
    (low, _), (full, _) = trained("adamw8bit", 1), trained("adamw", 1)
    for a, b in zip(low, full, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_later_steps_follow_adamw_and_moments_take_a_quarter() -> None:
    (low, eight), (full, _) = trained("adamw8bit", 40), trained("adamw", 40)
    way = (full[0] - trained("adamw", 0)[0][0]).norm()
    assert (low[0] - full[0]).norm() < 0.06 * way
    assert isinstance(eight, AdamW8bit)
    state = eight.state_dict()["state"]
    assert {t.dtype for t in state[0].values()} == {torch.uint8, torch.float32}
    taken = sum(t.nbytes for n, t in state[0].items() if n != "step")
    assert taken == 2 * (64 * 96 + 4 * 64)
    assert state[1].keys() == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize("model", [{}, LORA, LORA | {"dtype": "bfloat16", "base_dtype": "bfloat16"}])
def test_a_restored_learner_goes_on_bit_for_bit(model: dict[str, Any], policy_folder: Path, tmp_path: Path) -> None:
    config = config_of(policy_folder, model=model, optimizer=LOW)
    made = learner_of(config)
    batch = batch_of(learner_of(config_of(policy_folder)))
    for step in (1, 2):
        made.update([batch], step)
    save_shards(made.shards(), tmp_path / "checkpoint")
    restored = learner_of(config)
    restored.load(tmp_path / "checkpoint")
    codes = {n for s in restored.optimizer.state.values() for n, t in s.items() if t.dtype == torch.uint8}
    assert codes == ({"exp_avg", "exp_avg_sq"} if not model else codes)
    assert made.update([batch], 3) == restored.update([batch], 3)
    assert difference(restored.full_state(), made.full_state()) == 0
    assert difference(restored.full_state(ema=True), made.full_state(ema=True)) == 0
