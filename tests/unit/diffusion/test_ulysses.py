"""Real gloo ranks that share streams against one process that has them to itself: velocities, losses, gradients of every family.

The ranks run every case of `sequence_ranks.py` once, in processes of their own, while this process does the same alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from diffusion.packing import layout
from diffusion.ulysses import SequenceRanks
from tests.gloo import DEADLINE_S, launched
from tests.unit.diffusion.sequence_ranks import CASES, WAN, computed, numbered

WORLDS = [2, pytest.param(3, marks=pytest.mark.long), pytest.param(4, marks=pytest.mark.long)]


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return {name: computed(case) for name, case in CASES.items()}


@pytest.fixture(scope="module", params=WORLDS)
def group(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of so many ranks found."""
    return launched("tests.unit.diffusion.sequence_ranks", request.param, tmp_path_factory.mktemp("sequence"), 4 * DEADLINE_S)


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str, rounding: float = 1e-5) -> None:
    """To rounding of the largest value."""
    assert found.shape == expected.shape, name
    error, size = float((found - expected).abs().max()), float(expected.abs().max())
    assert error <= rounding * size, f"{name}: off by {error:.2g} at {size:.2g}"


@pytest.mark.parametrize("name", CASES)
def test_ranks_that_share_streams_compute_what_one_does(name: str, alone: dict[str, Any], group: list[dict[str, Any]]) -> None:
    expected = alone[name]
    assert max(float(v.abs().max()) for v in expected["velocities"]) > 1e-2
    for rank in group:
        for found, velocity in zip(rank[name]["velocities"], expected["velocities"], strict=True):
            assert_close(found, velocity, "velocities")
        assert torch.equal(rank[name]["loss"], group[0][name]["loss"])  # to the bit, as they all go on from it
        assert rank[name]["gradients"].keys() == expected["gradients"].keys()  # FSDP reduces what every rank has
    for parameter, gradient in expected["gradients"].items():
        shares = [rank[name]["gradients"][parameter] for rank in group]
        assert_close(torch.stack(shares).sum(0), gradient, parameter, 5e-5)
        assert not torch.equal(shares[0], gradient) or not gradient.any()


def test_heads_come_in_order_and_go_back_to_the_bit(group: list[dict[str, Any]]) -> None:
    assert torch.equal(torch.cat([rank["exchanged"]["heads"] for rank in group], 2), numbered())
    assert all(torch.equal(rank["exchanged"]["gathered"], numbered()) for rank in group)
    assert all(rank["exchanged"]["back"] and rank["exchanged"]["gradient"] for rank in group)


def test_each_rank_keeps_its_share_of_the_activations(group: list[dict[str, Any]]) -> None:
    """What the plan divides by the number of ranks; it leaves out that the output of an attention is kept twice, by heads and by tokens."""
    for rank in group:
        for name, (own, whole) in rank["kept"].items():
            assert own == pytest.approx(whole / len(group), rel=0.08), name


@pytest.mark.parametrize("total", [8, 9, 15, 31])
def test_parts_follow_each_other_and_differ_by_one_token_at_most(total: int) -> None:
    tokens = torch.arange(total)[None]
    parts = [SequenceRanks(i, 8).cut(tokens) for i in range(8)]
    assert torch.equal(torch.cat(parts, 1), tokens)
    assert {p.shape[1] for p in parts} <= {total // 8, -(-total // 8)}
    assert SequenceRanks(3, 8).lens(total) == [p.shape[1] for p in parts]


def test_a_part_does_not_hold_on_to_the_whole() -> None:
    part = SequenceRanks(0, 4).cut(torch.zeros(1, 400, 8))
    assert part.untyped_storage().nbytes() == 100 * 8 * 4


def test_what_cannot_be_shared_is_refused_with_both_numbers() -> None:
    with pytest.raises(ValueError, match="12 attention heads cannot be shared evenly by 8 sequence ranks; possible are 1, 2, 3, 4, 6, 12"):
        WanTransformer(WanConfig(**WAN)).share(SequenceRanks(0, 8))
    with pytest.raises(ValueError, match="a stream of 3 tokens cannot be shared by 4 sequence ranks"):
        layout((5, 9), (1, 2), None, SequenceRanks(0, 4))
