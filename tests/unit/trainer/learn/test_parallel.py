"""Blocks that are recomputed, shards in host memory: the same numbers to the bit; fewer activations kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule

from tests.gloo import alone
from tests.unit.trainer.learn.test_learner import GUIDED, LORA, batch_of, config_of, learner_of
from trainer.learn.batch import take
from trainer.learn.checkpoint import save_shards
from trainer.learn.learner import Learner
from trainer.learn.parallel import buffers_to
from trainer.learn.selftest import self_test

WAYS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "one unit": {"learner": {"shard_blocks": False}},
    "adapter, reverse KL, guidance": {"model": LORA, "objective": {"preset": "flow_grpo", "data_weight": 0.3}, "sampler": GUIDED},
    "bf16": {"model": {"dtype": "bfloat16"}},
    "bf16, adapter on bf16": {"model": LORA | {"dtype": "bfloat16", "base_dtype": "bfloat16"}},
}


@pytest.fixture(scope="module", autouse=True)
def _group() -> Iterator[None]:
    with alone():
        yield


def learners(folder: Path, **sections: dict[str, Any]) -> tuple[Learner, Learner]:
    """The same learner without and with recomputing."""
    plain, recomputed = (learner_of(config_of(folder, 4, **sections | {"learner": sections.get("learner", {}) | {"recompute": r}})) for r in (False, True))
    return plain, recomputed


@pytest.mark.parametrize("way", WAYS)
def test_recomputing_changes_no_bit_of_an_update(way: str, policy_folder: Path) -> None:
    plain, recomputed = learners(policy_folder, **WAYS[way])
    batch = batch_of(learner_of(config_of(policy_folder, sampler=WAYS[way].get("sampler", {}))))
    for step in (1, 2):
        assert plain.update([batch], step) == recomputed.update([batch], step)
    expected, found = plain.full_state(), recomputed.full_state()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("way", WAYS)
def test_shards_in_host_memory_change_no_bit_of_an_update(way: str, policy_folder: Path, tmp_path: Path) -> None:
    sections = WAYS[way]
    made = [learner_of(config_of(policy_folder, 4, **sections | {"learner": sections.get("learner", {}) | {"offload": o}})) for o in (False, True, True)]
    plain, offloaded, resumed = made
    for module in offloaded.model.modules():
        if isinstance(module, FSDPModule):
            group = module._get_fsdp_state()._fsdp_param_group
            assert group is None or (isinstance(group.offload_policy, CPUOffloadPolicy) and not group.offload_policy.pin_memory)
    batch = batch_of(learner_of(config_of(policy_folder, sampler=sections.get("sampler", {}))))
    assert plain.update([batch], 1) == offloaded.update([batch], 1)
    save_shards(offloaded.shards(), tmp_path / "checkpoint")
    resumed.load(tmp_path / "checkpoint")
    assert plain.update([batch], 2) == offloaded.update([batch], 2) == resumed.update([batch], 2)
    expected = plain.full_state()
    assert all(torch.equal(learner.full_state()[name], value) for learner in (offloaded, resumed) for name, value in expected.items())


def test_buffers_go_to_the_device_and_parameters_stay() -> None:
    model = torch.nn.BatchNorm1d(4)
    buffers_to(model, torch.device("meta"))
    assert {b.device.type for b in model.buffers()} == {"meta"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def gradients(learner: Learner) -> dict[str, torch.Tensor]:
    """Of a packed batch of two sizes."""
    g = torch.Generator().manual_seed(0)
    latents = [torch.randn(3, *size, generator=g) for size in ((8, 16), (8, 8), (8, 8))]
    prompts = [torch.randn(length, 64, generator=g) for length in (10, 7, 10)]
    out = learner.model(latents, torch.rand(3, generator=g), prompts, torch.randn(3, 64, generator=g))
    torch.cat([x.flatten() for x in out]).square().mean().backward()
    return {n: p.grad.full_tensor() for n, p in learner.model.named_parameters() if p.grad is not None}


def test_gradients_of_requests_of_several_sizes_are_the_same(policy_folder: Path) -> None:
    plain, recomputed = learners(policy_folder)
    expected, found = gradients(plain), gradients(recomputed)
    assert expected.keys() == found.keys()
    assert len(expected) > 20
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def kept(learner: Learner) -> int:
    """Bytes of activations that a pass of the policy loss keeps for its backward."""
    batch = batch_of(learner)
    rows = batch.transitions
    assert rows is not None
    taken, alive = take(rows, slice(0, 6)), dict[int, torch.Tensor]()
    known = {p.untyped_storage()._cdata for p in learner.model.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage()._cdata not in known:
            alive[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        learner.replay(taken, batch.conditioning_of(taken))
    return sum(tensor.untyped_storage().nbytes() for tensor in alive.values())


def test_recomputed_blocks_keep_their_inputs_alone(policy_folder: Path) -> None:
    plain, recomputed = learners(policy_folder)
    without, with_it = kept(plain), kept(recomputed)
    saved = plain.model.saved(plain.shape, 10, 4, False)
    assert without - with_it == pytest.approx(6 * (sum(saved.blocks) - sum(saved.inputs)), rel=0.1)
    assert with_it < without / 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_self_test_finds_the_same(dtype: str, policy_folder: Path) -> None:
    found = [self_test(learner) for learner in learners(policy_folder, model={"dtype": dtype})]
    assert found[0].largest == found[1].largest < (1e-6 if dtype == "float32" else 0.5)
    assert found[0].by_step == found[1].by_step
