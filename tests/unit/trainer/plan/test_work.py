"""Forwards, seconds and links of an update."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import vae_pass
from trainer.plan.gpus import GPUS
from trainer.plan.sizes import sizes_of
from trainer.plan.storage import storage_of
from trainer.plan.work import Work, evaluators, forwards, offloaded_bytes, samplers, work_of

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def recipe(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": MEDIUM, "dtype": "bfloat16"},
        "sampler": {"height": 512, "width": 512, "steps": 10, "trained_steps": 9, "guidance": 4.5},
        "rollout": {"groups_per_step": 4, "group_size": 6, "generators": 2, "gpus": 1},
        "learner": {"ranks": 2, "gpus": 1},
        "objective": {"data_per": "rollout"},
    }
    return parse_config({"updates": 100, **{name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}}})


def work(config: RunConfig, count: int = 4, price: float | None = None, gpu: str = "h100-80", **assumed: Any) -> Work:
    assumptions = Assumptions(**assumed)
    sizes = sizes_of(config, assumptions)
    vae = vae_pass(sizes, config.sampler.height, config.sampler.width)
    return work_of(config, sizes, vae, storage_of(config, sizes), GPUS[gpu], count, assumptions, price)


def test_forwards_of_an_update() -> None:
    found = forwards(recipe())
    assert found == {"sampling": 24 * 10 * 2, "policy loss": 24 * 9 * (3 + 1), "data loss": 24 * 3}  # the unconditional branch has no backward
    assert forwards(recipe(learner={"recompute": True}))["policy loss"] == 24 * 9 * (4 + 1)
    assert forwards(recipe(objective={"kl_weight": 0.04}))["policy loss"] == 24 * 9 * (3 + 1 + 2)  # the reference is guided too
    assert forwards(recipe(objective={"data_per": "transition"}))["data loss"] == 24 * 9 * 3
    sft = forwards(recipe(objective={"preset": "sft"}, data={"batch_size": 5}))
    assert sft == {"sampling": 0, "policy loss": 0, "data loss": 15}


def test_the_policy_before_a_claims_first_of_several_updates_is_asked_once_more() -> None:
    several = {"updates_per_claim": 2}
    assert forwards(recipe(learner=several))["policy loss"] == 24 * 9 * (3 + 1)  # of the rollouts' own densities
    assert forwards(recipe(learner=several, objective={"old_log_prob": "learner"}))["policy loss"] == 24 * 9 * (3 + 1 + 2)  # guided
    plain, nft = {"guidance": 1}, {"preset": "diffusion_nft", "kl_weight": 0}
    assert forwards(recipe(sampler=plain, objective=nft))["policy loss"] == 24 * 9 * (3 + 1)  # a policy that is kept
    assert forwards(recipe(sampler=plain, objective={**nft, "old_decay": 0}))["policy loss"] == 24 * 9 * 3
    assert forwards(recipe(sampler=plain, objective={**nft, "old_decay": 0}, learner=several))["policy loss"] == 24 * 9 * (3 + 1)


def test_ranks_of_a_generator_share_its_sampling() -> None:
    one, two = work(recipe(), 8), work(recipe(rollout={"sequence_ranks": 2}), 8)
    sampled = 480 * one.forward / (2 * 989e12 * 0.4)
    assert one.seconds["sampling"] - two.seconds["sampling"] == pytest.approx(sampled / 2)
    assert two.links["weights, read by generators"] == 2 * one.links["weights, read by generators"]
    assert work(recipe(rollout={"sequence_ranks": 2}), 4).colocated


def test_operations_and_seconds() -> None:
    found = work(recipe())
    assert found.forward == pytest.approx(2.4426e12, rel=0.002)  # counted of the network at 512 x 512, 333 tokens of text
    assert found.sampling == 480 * found.forward
    rate = 989e12 * 0.4
    texts = 28 * 2 * 333 * 5_580_620_800 / (2 * 67e12 * 0.4)  # 24 captions and 4 prompts, on the ranks
    assert found.seconds["training"] == pytest.approx((24 * 36 + 72) * found.forward / (2 * rate) + texts)
    decoding = 24 * 2.515e12 / (2 * 67e12 * 0.4)  # fp32
    assert found.seconds["sampling"] == pytest.approx(480 * found.forward / (2 * rate) + decoding + found.prompts / (2 * 67e12 * 0.4), rel=0.001)
    assert found.prompts == 4 * 2 * 333 * (123_650_304 + 694_659_840 + 4_762_310_656)  # of four groups
    assert not found.colocated
    assert found.seconds["update"] == max(found.seconds["training"], found.seconds["sampling"])
    assert found.hours == pytest.approx(100 * found.seconds["update"] / 3600)


def test_of_a_prepared_set_only_texts_are_encoded() -> None:
    assert work(recipe(data={"kind": "folder", "path": "pictures"})).encoding == pytest.approx(24 * (1.12e12 + 2 * 333 * 5.58e9), rel=0.01)
    assert work(recipe(data={"kind": "prepared", "path": "pictures"})).encoding == pytest.approx(24 * 2 * 333 * 5.58e9, rel=0.01)


def test_without_encoder_actors_ranks_encode_what_they_train_on() -> None:
    """On their own GPUs, 24 captions and 4 prompts, before they train; with actors it is done ahead."""
    config = {"data": {"kind": "prepared", "path": "pictures"}}
    own, shared = work(recipe(**config)), work(recipe(**config, encoder={"actors": 1, "gpus": 0.1}))
    assert own.seconds["training"] - shared.seconds["training"] == pytest.approx(28 * 2 * 333 * 5.58e9 / (2 * 0.4 * 67e12), rel=0.05)
    assert own.seconds["encoding"] == 0 < shared.seconds["encoding"]


def test_two_on_a_gpu_take_turns() -> None:
    shared = work(recipe(rollout={"gpus": 0.5}, learner={"gpus": 0.5}), count=2)
    assert shared.colocated
    assert shared.seconds["update"] == shared.seconds["training"] + shared.seconds["sampling"]
    strict = work(recipe(replay={"max_staleness": 0}))
    assert strict.seconds["update"] == strict.seconds["training"] + strict.seconds["sampling"]


def test_utilisation_precision_and_price() -> None:
    config = recipe(encoder={"actors": 1, "gpus": 0.1})
    plain = work(config)
    assert work(config, train_utilisation=0.2).seconds["training"] == pytest.approx(2 * plain.seconds["training"])
    single = work(recipe(encoder={"actors": 1, "gpus": 0.1}, model={"dtype": "float32"}))
    assert single.seconds["training"] == pytest.approx(989 / 67 * plain.seconds["training"])
    assert work(config, gpu="a100-80").seconds["training"] == pytest.approx(989 / 312 * plain.seconds["training"])
    assert plain.cost is None
    assert work(config, price=2.5).cost == pytest.approx(plain.hours * 4 * 2.5)


def test_offloading_takes_time_on_pcie_and_on_the_host() -> None:
    plain, offloaded = work(recipe()), work(recipe(learner={"offload": True}))
    assert "offload" not in plain.seconds
    shard, passes = 2_243_171_520 * 4 / 2, (1, 1)  # 24 x 9 / 2 transitions and 12 anchors fit one pass each
    over_pcie = (passes[0] * 3 + passes[1] * 2 + 1) * shard  # forward, unconditional, backward; forward, backward; gradients once
    on_host = (3 + 4 + 3) * shard  # weights and gradient, moments, average
    assert offloaded.seconds["offload"] == pytest.approx(over_pcie / 20e9 + on_host / 10e9)
    assert offloaded.seconds["training"] == pytest.approx(plain.seconds["training"] + offloaded.seconds["offload"])
    assert offloaded_bytes(recipe(learner={"offload": True, "shard_blocks": False}), sizes_of(recipe(), Assumptions()))[0] == (1 + 1 + 1) * shard
    more = recipe(learner={"offload": True, "micro_batch": 54, "accumulate": "sharded"})
    assert offloaded_bytes(more, sizes_of(more, Assumptions()))[0] == (2 * 3 + 2 + 3) * shard
    low = recipe(learner={"offload": True}, optimizer={"kind": "adamw8bit", "ema": 0.0})
    assert offloaded_bytes(low, sizes_of(low, Assumptions()))[1] == pytest.approx((3 + 1) * shard, rel=0.01)
    assert work(recipe(learner={"offload": True}), pcie_gb_s=1e9, host_gb_s=5.0).seconds["offload"] == pytest.approx(on_host / 5e9)


def test_links() -> None:
    found = work(recipe(rollout={"generators": 3}, encoder={"actors": 1}))
    version = 4 * (2_243_171_520 + 226_492_416)
    assert found.links["weights, handed in by ranks"] == version
    assert found.links["weights, read by generators"] == 3 * version
    assert found.links["anchor batch, written and read"] == 2 * 24 * 65_536 * 4
    assert found.links["encoded texts, read by ranks"] == (24 + 4) * (333 * 4096 + 2048) * 4


def test_a_run_on_cpus() -> None:
    found = work(parse_config({}), count=0)
    assert found.seconds["training"] == pytest.approx(found.training / (2 * 15e9))


@pytest.mark.parametrize(("generators", "busy"), [(1, 1.0), (2, 160 / 96), (8, 2.5), (32, 2.5)])
def test_an_evaluation_keeps_as_many_generators_busy_as_it_has_parcels(generators: int, busy: float) -> None:
    """32 prompts are one parcel, 8 prompts of 16 samples are four."""
    config = recipe(rollout={"generators": generators}, evaluation={"dev_prompts": 32, "diversity_prompts": 32, "diversity_samples": 16})
    assert evaluators(config) == busy


def test_an_own_datum_is_encoded_where_its_group_is_sampled() -> None:
    """Once a group, on the generator's GPU, its text with the prompt's; a feeder encodes every row apart."""
    data = {"kind": "folder", "path": "pictures"}
    free, own = (work(recipe(data={**data, "pairing": pairing}, encoder={"actors": 1, "gpus": 0.1})) for pairing in ("free", "own"))
    assert own.encoding == own.links["anchor batch, written and read"] == 0 < free.encoding
    assert own.decoding - free.decoding == pytest.approx(4 * 1.12e12, rel=0.01)
    assert free.links["encoded texts, read by ranks"] == 7 * own.links["encoded texts, read by ranks"]  # 24 rows and 4 groups


def test_a_group_is_sampled_by_one_generator() -> None:
    """4 groups keep 4 of 16 generators busy while none may be older than the step, 8 while they may be one older; 3 generators take two rounds."""

    def busy(generators: int, staleness: int) -> float:
        return samplers(recipe(rollout={"generators": generators}, replay={"max_staleness": staleness}))

    assert (busy(16, 0), busy(16, 1), busy(3, 0), busy(3, 1)) == (4, 8, 2, 3)
    one, many = (work(recipe(rollout={"generators": n}, replay={"max_staleness": 0}), count=64).seconds["sampling"] for n in (4, 60))
    assert one == many
