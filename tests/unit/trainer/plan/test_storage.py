"""Bytes of payloads against the encoder's own, and what the store and the disk must hold."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from actors.config import WeightsConfig
from actors.payload import DataPayload, GroupPayload, encode
from diffusion.kernel_names import stochastic_steps
from replay.errors import BudgetExceeded
from replay.policy import budget_error
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.sizes import sizes_of
from trainer.plan.storage import data_bytes, group_bytes, storage_of, stored_states

HEADER = 1200
"""Most bytes of a head's names, shapes, places and table."""


def recipe(members: int = 4, trained: int = 3, steps: int = 6, **sections: dict[str, Any]) -> RunConfig:
    sampler = {"steps": steps, "trained_steps": trained} | sections.pop("sampler", {})
    return parse_config({"sampler": sampler, "rollout": {"group_size": members, "groups_per_step": 2}, **sections})


@given(
    members=st.integers(2, 6),
    trained=st.integers(1, 4),
    steps=st.integers(6, 9),
    kernel=st.sampled_from(["flow_sde", "edm_2ab"]),
    own=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=20, deadline=None)
def test_a_group(members: int, trained: int, steps: int, kernel: str, own: bool, dtype: torch.dtype) -> None:
    data = {"kind": "folder", "path": "x", "pairing": "own", "caption_dropout": 0.1} if own else {}
    config = recipe(
        members, trained, steps, sampler={"kernel": kernel, "noise_level": 1.0}, data=data, replay={"store_dtype": str(dtype).removeprefix("torch.")}
    )
    shape = (3, 16, 48)
    stochastic = range(stochastic_steps(kernel, steps))
    assume(trained <= len(stochastic))
    apart = max(combinations(stochastic, trained), key=lambda chosen: len({*chosen, *(step + 1 for step in chosen)}))  # the draw that stores most
    chain = torch.randn(members, steps + 1, *shape).to(dtype).float()
    states = chain[:, apart]
    payload = GroupPayload(
        text='a sign that says "8"',
        x=states,
        x_next=chain[:, [step + 1 for step in apart]],
        log_prob=torch.zeros(members, trained, dtype=torch.float64),
        trained=torch.arange(trained),
        times=torch.zeros(steps + 1),
        previous=states.clone() if kernel == "edm_2ab" else None,
        x0=torch.zeros(shape) if own else None,
    )
    planned = group_bytes(config, sizes_of(config, Assumptions()))
    assert planned <= sum(map(len, encode(payload, dtype))) <= planned + HEADER
    assert (data_bytes(config, sizes_of(config, Assumptions())) == 0) == own


def test_steps_that_follow_each_other_store_one_state_more_than_there_are_steps() -> None:
    assert stored_states(recipe(trained=3)) == 6
    assert stored_states(recipe(trained=4)) == 6  # of the states before and after five stochastic steps
    assert stored_states(recipe(sampler={"trained_steps": [0, 1, 2]})) == 4
    assert stored_states(recipe(sampler={"trained_steps": [0, 2, 4]})) == 6


def test_an_anchor_batch() -> None:
    config = recipe()
    batch = DataPayload(("a sign",) * 8, torch.zeros(8, 3, 16, 48))
    planned = data_bytes(config, sizes_of(config, Assumptions()))
    assert planned <= sum(map(len, encode(batch))) <= planned + HEADER


def test_the_store() -> None:
    config = recipe()
    found = storage_of(config, sizes_of(config, Assumptions()))
    assert found.claim == 2 * found.group + found.data
    assert (found.groups, found.batches) == (2 * 2 + 20 * 2, 4 + 21)
    error = budget_error(found.group, found.data, found.groups, found.batches, found.retained)
    assert isinstance(error, BudgetExceeded)
    assert found.retained == found.groups * found.group + found.batches * found.data
    assert found.store.name == "Redis"
    folder = storage_of(recipe(replay={"payloads": "/shared", "max_bytes": 2**31}), sizes_of(config, Assumptions()))
    assert (folder.store.name, folder.store.bytes) == ("folder", 2**31)


@pytest.mark.parametrize("rank", [0, 4])
def test_the_disk(rank: int) -> None:
    """Two checkpoints and the one being written, two exports with their averages."""
    config = recipe(model={"lora": {"rank": rank}})
    sizes = sizes_of(config, Assumptions())
    kept = {part.name: part.bytes for part in storage_of(config, sizes).disk}
    network = sizes.transformer
    plain = 1_302_128 + 55_296
    if rank:
        assert kept["checkpoints"] == 3 * 16 * network.trained
        assert kept["exports"] == 2 * 2 * 4 * (plain + network.trained)  # merged, and the adapter beside
    else:
        assert kept["checkpoints"] == 3 * (16 * network.trained + 4 * network.buffers)
        assert kept["exports"] == 2 * 2 * 4 * plain
    assert kept["weights"] == 4 * 4 * sizes.published_values
    objects = storage_of(config.model_copy(update={"weights": WeightsConfig(transport="objects")}), sizes)
    assert "weights" not in {part.name for part in objects.disk}
