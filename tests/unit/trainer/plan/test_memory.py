"""Bytes of ranks, generators and hosts as functions of the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from actors.evaluator import SAMPLES_A_PARCEL
from actors.weights.shards import PART_BYTES
from diffusion.checkpoint import load_codec
from diffusion.engine.cache import MAX_BYTES
from diffusion.families.wan.tiny import write_tiny as write_wan
from diffusion.weights import SHARD_BYTES
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.learn.optimizer import AdamW8bit
from trainer.plan import memory
from trainer.plan.assumptions import Assumptions
from trainer.plan.dry import VAEPass, vae_pass
from trainer.plan.memory import generator, hosts, learner_rank, micro_rows, pass_count, processes, rank_rows, rewards
from trainer.plan.sizes import sizes_of

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
P, BUFFERS = 2_243_171_520, 226_492_416
TEXT = 123_650_304 + 694_659_840 + 4_762_310_656


def recipe(**sections: dict[str, Any]) -> RunConfig:
    base: dict[str, dict[str, Any]] = {
        "model": {"path": MEDIUM, "dtype": "bfloat16"},
        "sampler": {"height": 512, "width": 512, "steps": 10, "trained_steps": 4},
        "rollout": {"groups_per_step": 8, "group_size": 8, "gpus": 1},
        "learner": {"ranks": 8, "micro_batch": 4, "gpus": 1},
        "objective": {"data_per": "rollout"},
    }
    return parse_config({name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})


def rank(config: RunConfig) -> dict[str, float]:
    return {part.name: part.bytes for part in learner_rank(config, sizes_of(config, Assumptions()))}


def test_full_training_over_eight_ranks() -> None:
    found = rank(recipe())
    assert found["weights"] == P * 4 / 8 + BUFFERS * 4
    assert found["optimiser"] == P * 8 / 8
    assert found["average"] == P * 4 / 8
    assert found["gradients"] == P * 4  # several passes accumulate
    assert found["casts of weights"] == P * 2
    sizes = sizes_of(recipe(), Assumptions())
    assert found["gathered weights"] == 4 * (sizes.root + 3 * max(sizes.blocks))


def test_rows_and_passes() -> None:
    config = recipe()
    assert rank_rows(config) == (8 * 4, 8)  # one group of 8 with 4 trained steps; an eighth of 64 anchors
    assert (pass_count(config, 1357), micro_rows(config, 1357)) == (8 + 2, 4)
    assert rank_rows(recipe(learner={"ranks": 3})) == (22 * 4, 22)  # of 64 members
    assert micro_rows(recipe(learner={"micro_batch": 20}), 1357) == 16  # 32 rows in two passes
    assert rank_rows(recipe(objective={"preset": "sft"}, data={"batch_size": 16})) == (0, 2)
    two = recipe(learner={"updates_per_claim": 2})
    assert rank_rows(two) == rank_rows(config)  # of both updates
    assert rank_rows(two, 2) == (4 * 4, 4)
    assert (pass_count(two, 1357), micro_rows(two, 1357)) == (4 + 1, 4)


def test_sequence_ranks_share_activations_and_have_rows_together() -> None:
    shared = recipe(learner={"sequence_ranks": 4})
    assert rank_rows(shared) == (32 * 4, 32)  # four ranks have a quarter of 64 members, and as many anchors
    found, whole = rank(shared), rank(recipe())
    assert found["activations"] == whole["activations"] / 4  # of as many rows
    assert {n: found[n] for n in ("weights", "optimiser", "average", "gathered weights", "rows of a pass")} == {
        n: whole[n] for n in ("weights", "optimiser", "average", "gathered weights", "rows of a pass")
    }
    assert micro_rows(recipe(learner={"sequence_ranks": 4, "micro_tokens": 1357, "micro_batch": 8}), 1357) == 4  # a rank's tokens are bounded
    with pytest.raises(ConfigError, match=r"learner\.sequence_ranks: 24 attention heads cannot be shared evenly by 16 sequence ranks"):
        rank(recipe(learner={"ranks": 16, "sequence_ranks": 16}))


def test_ranks_of_a_generator_share_activations_and_each_has_the_network() -> None:
    def parts(**rollout: int) -> dict[str, tuple[int, dict[str, float]]]:
        config = recipe(rollout={"generators": 2, **rollout})
        sizes = sizes_of(config, Assumptions())
        return {p.name: (p.count, {q.name: q.bytes for q in p.parts}) for p in processes(config, sizes, vae_pass(sizes, 512, 512), Assumptions())}

    one, four = parts(), parts(sequence_ranks=4)
    assert "generator rank" not in one
    assert (four["generator"][0], four["generator rank"][0]) == (2, 6)
    leader, follower = four["generator"][1], four["generator rank"][1]
    assert leader["activations"] == follower["activations"] == one["generator"][1]["activations"] / 4
    assert follower["weights"] == leader["weights"] == one["generator"][1]["weights"]
    assert {"VAE", "decoding", "text encoders", "states"} <= leader.keys() - follower.keys()
    with pytest.raises(ConfigError, match=r"rollout\.sequence_ranks: 24 attention heads cannot be shared evenly by 16 sequence ranks"):
        parts(sequence_ranks=16)


def test_replicas_hold_larger_shards() -> None:
    found, whole = rank(recipe(learner={"replicas": 2})), rank(recipe(learner={"ranks": 4}))
    shards = ("weights", "optimiser", "average", "gathered weights")
    assert {n: found[n] for n in shards} == {n: whole[n] for n in shards}
    assert rank_rows(recipe(learner={"replicas": 2})) == rank_rows(recipe())


def test_a_token_budget_bounds_the_rows_of_a_pass() -> None:
    assert sizes_of(recipe(), Assumptions()).tokens == 1357
    bounded = recipe(learner={"micro_tokens": 3 * 1357})
    assert (pass_count(bounded, 1357), micro_rows(bounded, 1357)) == (11 + 3, 3)
    assert rank(bounded)["activations"] == rank(recipe(learner={"micro_batch": 3}))["activations"] < rank(recipe())["activations"]
    alone = recipe(learner={"micro_tokens": 1000})
    assert (pass_count(alone, 1357), micro_rows(alone, 1357)) == (32 + 8, 1)
    assert micro_rows(recipe(learner={"micro_tokens": 100_000}), 1357) == 4  # micro_batch stays the other bound


def test_moments_in_8_bits() -> None:
    full, found = rank(recipe()), rank(recipe(optimizer={"kind": "adamw8bit"}))
    assert 0.25 < found["optimiser"] / full["optimiser"] < 0.257  # scales of blocks, and small parameters in fp32
    assert {n: b for n, b in found.items() if n != "optimiser"} == {n: b for n, b in full.items() if n != "optimiser"}
    tiny = recipe(model={"path": "glyph-base"}, sampler={"height": 16, "width": 48}, optimizer={"kind": "adamw8bit"})
    network = sizes_of(tiny, Assumptions()).network
    optimizer = AdamW8bit([p for p in network.parameters() if p.requires_grad], tiny.optimizer)
    states = [optimizer._fresh(p) for p in network.parameters()]
    assert rank(tiny)["optimiser"] == sum(t.nbytes for s in states for n, t in s.items() if n != "step") / 8


def test_what_is_offloaded_lies_on_the_host() -> None:
    plain, config = recipe(objective={"kl_weight": 0.04}), recipe(objective={"kl_weight": 0.04}, learner={"offload": True})
    full, found = rank(plain), rank(config)
    assert found["weights"] == found["reference"] == BUFFERS * 4
    assert not {"optimiser", "average"} & found.keys()
    assert found["gradients"] == full["gradients"] == P * 4  # whole while passes accumulate, wherever the parts rest
    host = {p.name: p.bytes for p in hosts(config, sizes_of(config, Assumptions()))[0].parts}
    assert [host[n] for n in ("weights", "optimiser", "average", "gradients", "reference")] == [P / 2, P, P / 2, P / 2, P / 2]
    assert not {"weights", "optimiser"} & {p.name for p in hosts(plain, sizes_of(plain, Assumptions()))[0].parts}
    one = rank(recipe(learner={"offload": True, "ranks": 1, "accumulate": "sharded"}))
    sizes = sizes_of(config, Assumptions())
    assert one["gathered weights"] == 4 * (sizes.root + 3 * max(sizes.blocks))  # the GPU holds no shard to compute with
    assert one["gradients"] == 2 * 4 * max(sizes.blocks)
    assert rank(recipe(learner={"offload": True, "gpus": 0})) == rank(recipe(learner={"gpus": 0}))


def test_one_pass_keeps_sharded_gradients_only() -> None:
    config = recipe(objective={"preset": "sft"}, data={"batch_size": 16})
    sizes = sizes_of(config, Assumptions())
    assert rank(config)["gradients"] == P * 4 / 8 + 2 * 4 * max(sizes.blocks)
    assert rank(recipe(learner={"accumulate": "sharded"}))["gradients"] == P * 4 / 8 + 2 * 4 * max(sizes.blocks)
    assert rank(recipe(learner={"accumulate": "sharded", "ranks": 1}))["gradients"] == P * 4


def test_an_adapter_alone_has_gradients_and_moments() -> None:
    full, found = rank(recipe()), rank(recipe(model={"path": MEDIUM, "dtype": "bfloat16", "lora": {"rank": 32}}))
    adapter = 23_887_872
    assert (found["optimiser"], found["gradients"]) == (adapter, adapter * 4)
    assert found["activations"] < 0.75 * full["activations"]
    assert found["weights"] > full["weights"]


def test_frozen_weights_may_be_held_in_bf16() -> None:
    adapted: dict[str, Any] = {"path": MEDIUM, "dtype": "bfloat16", "lora": {"rank": 32}}
    full, half = rank(recipe(model=adapted)), rank(recipe(model=adapted | {"base_dtype": "bfloat16"}))
    adapter = 23_887_872
    assert half["weights"] == (P * 2 + adapter * 4) / 8 + BUFFERS * 2
    assert half["casts of weights"] == adapter * 2  # those of the adapter; the others are in bf16 already
    assert half["gathered weights"] == pytest.approx(full["gathered weights"] * (P * 2 + adapter * 4) / (P * 4 + adapter * 4))
    assert all(half[name] == full[name] for name in ("optimiser", "average", "gradients", "activations"))


def test_recomputing_trades_activations() -> None:
    full, found = rank(recipe()), rank(recipe(learner={"recompute": True}))
    assert found["activations"] < full["activations"] / 4
    assert {n: b for n, b in found.items() if n != "activations"} == {n: b for n, b in full.items() if n != "activations"}


def test_what_a_reference_and_one_unit_take() -> None:
    assert rank(recipe(objective={"kl_weight": 0.04}))["reference"] == (P / 8 + BUFFERS) * 4
    assert "reference" not in rank(recipe(objective={"kl_weight": 0.04}, model={"path": MEDIUM, "lora": {"rank": 4}}))
    whole = rank(recipe(learner={"shard_blocks": False}))
    assert whole["gathered weights"] == P * 4
    assert "gathered weights" not in rank(recipe(learner={"ranks": 1}))


def test_loading_is_said_where_it_takes_most() -> None:
    """A rank reads its own shards; random weights are drawn whole."""
    assert "loading" not in rank(recipe())
    drawn = rank(
        recipe(
            model={"path": MEDIUM, "init": True, "text_dtype": "bfloat16"},
            learner={"ranks": 64, "micro_batch": 1, "gpus": 0},
            rollout={"groups_per_step": 64, "group_size": 2},
        )
    )
    assert sum(drawn.values()) >= 4 * (P + BUFFERS)


def test_text_encoders_are_held_once_where_actors_hold_them() -> None:
    parts: dict[str, dict[str, Any]] = {"encoder": {"actors": 2, "gpus": 0.1}, "data": {"kind": "prepared", "path": "/sets/a"}}
    own, shared = recipe(data=parts["data"]), recipe(**parts)
    for config, holders in ((own, {"generator", "learner rank"}), (shared, {"encoder"})):
        sizes = sizes_of(config, Assumptions())
        found = processes(config, sizes, vae_pass(sizes, 512, 512), Assumptions()) + hosts(config, sizes)
        assert {p.name for p in found for part in p.parts if part.name == "text encoders" and part.bytes == 4 * TEXT} == holders
        placed = {(p.name, p.count, p.gpus) for p in found}
        assert (("encoder", 2, 0.1) in placed) == (config is shared)


def test_a_generator() -> None:
    config = recipe(sampler={"guidance": 4.5, "max_tokens": 50_000})
    sizes = sizes_of(config, Assumptions())
    vae = vae_pass(sizes, 512, 512)
    found = {part.name: part for part in generator(config, sizes, vae, Assumptions())}
    assert found["weights"].bytes == (P + BUFFERS) * 4
    assert found["casts of weights"].bytes == P * 2
    assert found["text encoders"].bytes == 4 * TEXT  # they are where the generator runs
    assert found["activations"].bytes == 32 * 1357 * sizes.network.activation_bytes(2)  # a parcel of an evaluation, more than 8 guided rollouts
    many = recipe(sampler={"guidance": 4.5, "max_tokens": 60_000}, rollout={"group_size": 8, "concurrent_groups": 4})
    assert next(p.bytes for p in generator(many, sizes, vae, Assumptions()) if p.name == "activations") == 60_000 * sizes.network.activation_bytes(2)
    assert found["decoding"].bytes == 4 * vae.decode.peak
    assert found["encoding"].bytes == 4 * vae.encode.peak  # of held-out pictures
    assert found["weights under evaluation"].bytes == (P + BUFFERS) * 4
    assert found["states"].bytes == 8 * 3 * 16 * 64 * 64 * 4
    merged = recipe(model={"path": MEDIUM, "lora": {"rank": 32, "merge": True}}, objective={"old_log_prob": "learner"})
    kept = {part.name: part.bytes for part in generator(merged, sizes_of(merged, Assumptions()), vae, Assumptions())}
    assert kept["weights under evaluation"] == 23_887_872 * 4  # the adapter alone
    assert kept["unmerged weights"] == 4 * 1536**2 * (24 * 7 + 23 + 13 * 4)  # q, k, v of both streams and out; out of the text; second attentions


def test_a_vae_is_run_without_its_numbers() -> None:
    found = vae_pass(sizes_of(recipe(), Assumptions()), 512, 512)
    assert found.decode.flops == pytest.approx(2.51e12, rel=0.01)  # counted of diffusers' AutoencoderKL
    assert found.encode.flops == pytest.approx(1.12e12, rel=0.01)
    assert found.decode.peak == 3 * 256 * 512 * 512 * 4  # three tensors of 256 channels at full size
    assert found.batch == 4
    big = vae_pass(sizes_of(recipe(sampler={"height": 2048, "width": 2048}), Assumptions()), 2048, 2048)
    assert big.decode.peak == 4 * found.decode.peak  # tiles of 1024
    assert big.batch == 1


def test_who_is_there() -> None:
    found = processes(recipe(), sizes_of(recipe(), Assumptions()), VAEPass(), Assumptions())
    assert [(p.name, p.count, p.gpus) for p in found] == [("learner rank", 8, 1), ("generator", 2, 1)]
    assert all(p.parts[-1].name == "process" for p in found)
    rewarded = recipe(fleet={"rewards": {"ocr": {"kind": "ocr", "device": "cuda", "gpus": 0.25}}})
    assert [p.name for p in processes(rewarded, sizes_of(rewarded, Assumptions()), VAEPass(), Assumptions())][-1] == "reward ocr"
    sft = recipe(objective={"preset": "sft"}, data={"batch_size": 16})
    assert [p.name for p in processes(sft, sizes_of(sft, Assumptions()), VAEPass(), Assumptions())] == ["learner rank", "generator"]


def test_a_generator_of_clips_holds_states_as_they_are_stored_and_a_few_clips(tmp_path: Path) -> None:
    for part, values in {
        "transformer": {"_class_name": "WanTransformer3DModel", "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "vae": {"_class_name": "AutoencoderKLWan"},
        "text_encoder": {
            "architectures": ["UMT5EncoderModel"],
            "vocab_size": 256384,
            "d_model": 4096,
            "d_kv": 64,
            "d_ff": 10240,
            "num_heads": 64,
            "num_layers": 24,
        },
    }.items():
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_text(json.dumps(values))
    path = str(tmp_path)
    sampler = {"kernel": "edm_2ab", "height": 704, "width": 1280, "frames": 93, "steps": 20, "trained_steps": 10}
    evaluation = {"diversity_samples": 2, "test_prompts": 16}
    config = recipe(model={"path": path}, sampler=sampler, replay={"store_dtype": "bfloat16"}, evaluation=evaluation)
    parts = {part.name: part.bytes for p in hosts(config, sizes_of(config, Assumptions())) if p.name == "generator" for part in p.parts}
    latent, clip = 16 * 24 * 88 * 160, 93 * 704 * 1280 * 3
    assert parts["payload in the making"] == 30 * 2 * latent == 324_403_200
    assert parts["stored states"] == 2 * 8 * 30 * 2 * latent  # a group that is sampled, one that is scored
    assert parts["pixels"] == 4 * clip  # two turns of one clip, and the samples of one prompt for the diversity figure
    small = recipe(model={"path": path}, sampler={**sampler, "frames": 9, "height": 256, "width": 256}, evaluation=evaluation)
    parts = {part.name: part.bytes for p in hosts(small, sizes_of(small, Assumptions())) if p.name == "generator" for part in p.parts}
    assert parts["stored states"] == 2 * 8 * 30 * 4 * 16 * 3 * 32 * 32


def test_hosts_hold_their_own_evaluations_and_the_noise_of_all() -> None:
    few, many = recipe(), recipe(objective={"data_per": "transition"})

    def evaluations(config: RunConfig) -> tuple[float, float]:
        found = {p.name: p.bytes for p in hosts(config, sizes_of(config, Assumptions()))[0].parts}
        assert found["encoded texts"] == (8 + 8) * (333 * 4096 + 2048) * 4 + 256 * 2**20  # captions and prompts, each once
        return found["anchor evaluations"], found["anchor noise"]

    latent = 16 * 64 * 64
    row = 2 * latent * 4
    assert evaluations(few) == (2 * 8 * row, 64 * latent * 4)
    assert evaluations(many) == ((4 + 1) * 8 * row, 4 * 64 * latent * 4)


def test_what_the_old_policy_says_is_kept_where_it_is_as_large_as_a_latent() -> None:
    def kept(**sections: Any) -> float:
        config = recipe(**sections)
        return sum(p.bytes for p in hosts(config, sizes_of(config, Assumptions()))[0].parts if p.name == "old policy's predictions")

    said, several = 32 * 16 * 64 * 64 * 4, {"updates_per_claim": 2}
    assert kept() == 0
    assert kept(objective={"preset": "diffusion_nft"}, sampler={"trained_steps": 4, "guidance": 1}) == said
    assert kept(objective={"preset": "grpo_guard"}) == 0  # of one update it is the policy at hand
    assert kept(objective={"preset": "grpo_guard"}, learner=several) == said
    assert kept(objective={"old_log_prob": "learner"}, learner=several) == 0  # a number a row


def test_a_checkpoint_being_written_is_a_copy_of_the_ranks_shards() -> None:
    def copied(**sections: Any) -> float:
        config = recipe(**sections)
        return {p.name: p.bytes for p in hosts(config, sizes_of(config, Assumptions()))[0].parts}.get("checkpoint", 0.0)

    assert copied() == 16 * P / 8 + 4 * BUFFERS  # weights, two moments, average
    assert copied(optimizer={"ema": 0}, learner={"ranks": 4}) == 12 * P / 4 + 4 * BUFFERS
    assert copied(model={"lora": {"rank": 16}}) < copied() / 50  # an adapter's
    assert copied(learner={"checkpoint_async": False}) == 0


def test_objects_of_published_versions_lie_in_the_nodes_memory() -> None:
    """Two newest, one that arrives, one that is evaluated; in the type that travels. Files take none of it."""
    config = recipe(weights={"transport": "objects"})
    held = {p.name: p.parts[0].bytes for p in hosts(config, sizes_of(config, Assumptions()))}
    assert held["object store"] == 4 * (P + BUFFERS) * 4
    half = recipe(weights={"transport": "objects", "dtype": "bfloat16"}, objective={"old_log_prob": "learner"}, evaluation={"every": 0})
    held = {p.name: p.parts[0].bytes for p in hosts(half, sizes_of(half, Assumptions()))}
    assert held["object store"] == 3 * (P + BUFFERS) * 2
    assert "object store" not in {p.name for p in hosts(recipe(), sizes_of(config, Assumptions()))}


def test_sizes_that_the_plan_knows_are_those_of_the_code() -> None:
    """The planner imports nothing that runs."""
    assert memory.PARCEL == SAMPLES_A_PARCEL
    assert memory.PROMPT_CACHE == MAX_BYTES
    assert memory.SHARD == SHARD_BYTES
    assert memory.PART == PART_BYTES


def test_a_clip_goes_through_the_vae_a_latent_frame_at_a_time() -> None:
    """Operations are those of the codec; memory does not grow with the length; above 832 pixels it is that of a tile."""
    wan = {"model": {"path": "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"}}
    large = vae_pass(sizes_of(recipe(**wan), Assumptions()), 480, 832, 81)
    assert (large.decode.flops, large.encode.flops) == (pytest.approx(275e12, rel=0.01), pytest.approx(164e12, rel=0.01))  # counted of the class, whole
    assert large.decode.peak == vae_pass(sizes_of(recipe(**wan), Assumptions()), 480, 832, 17).decode.peak == pytest.approx(20e3 * 480 * 832, rel=0.05)
    assert (large.tiled, large.batch) == (False, 1)
    tiled = vae_pass(sizes_of(recipe(**wan), Assumptions()), 704, 1280, 93)
    assert tiled.tiled
    assert tiled.decode.peak == pytest.approx(large.decode.peak * 256**2 / (480 * 832), rel=0.05)


def test_operations_of_a_clip_are_those_of_the_codec(tmp_path: Path) -> None:
    write_wan(tmp_path)
    sizes = sizes_of(recipe(model={"path": str(tmp_path)}, sampler={"height": 32, "width": 48, "frames": 9}), Assumptions())
    codec = load_codec(tmp_path)
    planned = vae_pass(sizes, 32, 48, 9)
    for pass_, run in (
        (planned.decode, lambda: codec.decode(torch.zeros(1, 16, 3, 4, 6))),
        (planned.encode, lambda: codec.encode(np.zeros((1, 9, 32, 48, 3), np.uint8))),
    ):
        with FlopCounterMode(display=False) as counter:
            run()
        assert pass_.flops == pytest.approx(counter.get_total_flops(), rel=0.05)  # 1 x 1 convolutions before and after are not counted


def test_what_videoalign_takes() -> None:
    """Weights of Qwen2-VL-2B and a batch, however large the share that it asks for; a share of another reward is taken to be filled."""
    settings = {"kind": "videoalign", "path": "/m", "device": "cuda", "gpus": 0.25}
    found = rewards(recipe(rewards={"judge": {}}, fleet={"rewards": {"judge": settings}}))
    assert [(p.name, p.gpus, p.reserved) for p in found] == [("reward judge", 0.25, False)]
    parts = {part.name: part.bytes for part in found[0].parts}
    assert parts["weights"] == 2 * 2_208_563_200
    assert 1e9 < parts["activations"] < 4e9  # 51,000 patches, or 13,000 tokens of video and 32 templates
    small = rewards(recipe(rewards={"judge": {}}, fleet={"rewards": {"judge": {**settings, "batch_cost": 5_000_000, "batch_items": 4}}}))[0]
    assert {part.name: part.bytes for part in small.parts}["activations"] < 0.4 * parts["activations"]
