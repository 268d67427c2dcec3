"""Which processes share a GPU, and what is proposed for a run that does not fit."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.plan.assumptions import Assumptions
from trainer.plan.fit import Setting, changes, place
from trainer.plan.gpus import GPUS, gpu_of
from trainer.plan.memory import Part, Process

MEDIUM = "stabilityai/stable-diffusion-3.5-medium"
HALF: dict[str, Any] = {"path": MEDIUM, "dtype": "bfloat16", "text_dtype": "bfloat16"}


def process(name: str, count: int, gpus: float, size: float = 10.0, reserved: bool = False) -> Process:
    return Process(name, count, gpus, (Part("all", size),), reserved)


def setting(gpu: str = "h100-80", count: int = 1, **sections: dict[str, Any]) -> Setting:
    base: dict[str, dict[str, Any]] = {
        "model": HALF,
        "sampler": {"height": 512, "width": 512},
        "rollout": {"groups_per_step": 8, "group_size": 8, "gpus": 0.5, "generators": 1},
        "learner": {"ranks": 1, "gpus": 0.5, "micro_batch": 4},
    }
    config = parse_config({name: base.get(name, {}) | sections.get(name, {}) for name in {**base, **sections}})
    return Setting(config, Assumptions(), GPUS[gpu], count)


def test_colocated_processes_add_up() -> None:
    found = place([process("learner rank", 2, 0.5, 30), process("generator", 2, 0.5, 20)], 2, 100, 0.9)
    assert [[p.name for p in d.holds] for d in found.devices] == [["learner rank", "generator"]] * 2
    assert (found.most, found.fits, found.idle) == (50, True, 0)
    assert not place([process("learner rank", 2, 0.5, 80), process("generator", 2, 0.5, 20)], 2, 100, 0.9).fits


def test_two_ranks_do_not_share_a_gpu() -> None:
    found = place([process("learner rank", 2, 0.25)], 1, 100, 0.9)
    assert found.homeless == {"learner rank": 1}
    assert place([process("generator", 2, 0.5)], 1, 100, 0.9).fits


def test_shares_that_are_too_large_find_no_gpu() -> None:
    found = place([process("learner rank", 1, 1), process("generator", 1, 0.5)], 1, 100, 0.9)
    assert found.homeless == {"generator": 1}
    assert place([process("learner rank", 1, 1), process("generator", 1, 2)], 3, 100, 0.9).homeless == {}


def test_an_unknown_reward_fills_its_share() -> None:
    found = place([process("generator", 1, 0.5, 45), process("reward clip", 1, 0.5, 0, reserved=True)], 1, 100, 0.9)
    assert found.most == 45 + 50
    assert not found.fits


@given(st.lists(st.tuples(st.integers(1, 4), st.sampled_from([0, 0.25, 0.5, 1, 2])), max_size=4), st.integers(0, 8))
def test_no_gpu_is_given_away_twice(asked: list[tuple[int, float]], count: int) -> None:
    parts = [process(f"p{i}", n, gpus) for i, (n, gpus) in enumerate(asked)]
    found = place(parts, count, 100, 0.9)
    assert all(sum(min(1.0, p.gpus) for p in d.holds) <= 1 + 1e-9 for d in found.devices)
    placed = sum(len(d.holds) for d in found.devices)
    whole = {p.name: max(1, int(p.gpus)) for p in parts}
    asked_for = sum(p.count * whole[p.name] for p in parts if p.gpus)
    assert placed + sum(n * whole[name] for name, n in found.homeless.items()) == asked_for


def test_the_first_change_is_the_one_that_alters_least() -> None:
    full = setting(learner={"ranks": 1, "gpus": 0.5, "micro_batch": 16})
    assert not full.placement().fits
    found = {c.name: c for c in changes(full)}
    expected = ["activation checkpointing", "shards in host memory", "moments in 8 bits", "an adapter instead of all weights", "a smaller micro-batch"]
    assert list(found)[:5] == expected
    assert found["shards in host memory"].keys == ("learner.offload=true",)
    assert found["moments in 8 bits"].keys == ("optimizer.kind=adamw8bit",)
    assert found["activation checkpointing"].keys == ("learner.recompute=true",)
    assert found["an adapter instead of all weights"].keys == ("model.lora.rank=32", "model.lora.alpha=64")
    assert found["another GPU"].keys == ("--gpu h200-141",)


def test_a_change_that_suffices_is_the_smallest_of_its_kind() -> None:
    lora = setting(model=HALF | {"lora": {"rank": 32}}, encoder={"actors": 1}, learner={"ranks": 1, "gpus": 0.5, "micro_batch": 32})
    found = {c.name: c for c in changes(lora)}
    assert "an adapter instead of all weights" not in found
    smaller = found["a smaller micro-batch"]
    assert smaller.fits
    assert smaller.keys == ("learner.micro_batch=16",)
    again = lora.with_keys(learner__micro_batch=16)
    assert again is not None
    assert again.placement().most == smaller.most


def test_shards_in_host_memory_are_proposed_where_they_suffice() -> None:
    full = setting("h100-80", learner={"ranks": 1, "gpus": 0.5, "micro_batch": 1, "recompute": True})
    found = {c.name: c for c in changes(full)}
    offloaded = found["shards in host memory"]
    p = 2_243_171_520
    placed = full.placement().most
    assert placed - offloaded.most > 4 * 3 * p  # moments and average, and of the weights what is not gathered
    low = found["moments in 8 bits"]
    assert placed - low.most == pytest.approx(6 * p, rel=0.01)
    already = full.with_keys(learner__offload=True)
    assert already is not None
    assert not {"shards in host memory", "moments in 8 bits"} & {c.name for c in changes(already)}


def test_ranks_that_share_the_tokens_of_a_sample_are_proposed() -> None:
    """As many as share both 24 heads and the ranks evenly: of six ranks two, three or all."""
    large: dict[str, Any] = {"sampler": {"height": 1024, "width": 1024}, "rollout": {"gpus": 0}}
    six = setting("rtx4090-24", 6, learner={"ranks": 6, "gpus": 1, "micro_batch": 1}, **large)
    shared = next(c for c in changes(six) if c.name == "ranks that share the tokens of a sample")
    assert (shared.keys, shared.fits) == (("learner.sequence_ranks=6",), False)  # the furthest
    assert shared.most < six.placement().most
    five = setting("rtx4090-24", 5, learner={"ranks": 5, "gpus": 1, "micro_batch": 1}, **large)
    assert not [c for c in changes(five) if c.name == shared.name]


def test_a_token_budget_is_undercut_by_fewer_samples() -> None:
    lora = setting(model=HALF | {"lora": {"rank": 32}}, encoder={"actors": 1}, learner={"ranks": 1, "gpus": 0.5, "micro_batch": 160, "micro_tokens": 32 * 1357})
    assert next(c for c in changes(lora) if c.name == "a smaller micro-batch").keys == ("learner.micro_batch=16",)


def test_half_precision_of_what_is_frozen_is_proposed() -> None:
    lora = setting(model=HALF | {"text_dtype": "float32", "lora": {"rank": 32}}, learner={"ranks": 1, "gpus": 0.5, "micro_batch": 32})
    found = {c.name: c for c in changes(lora)}
    text, frozen = found["text encoders in bf16"], found["frozen weights in bf16"]
    assert (text.keys, frozen.keys) == (("model.text_dtype=bfloat16",), ("model.base_dtype=bfloat16",))
    full = lora.placement().most
    assert full - text.most == 2 * 2 * (123_650_304 + 694_659_840 + 4_762_310_656)  # of the generator and of the rank
    assert full - frozen.most > 2 * 2 * 2_243_171_520


def test_changes_are_made_together_before_another_gpu_is_bought() -> None:
    tight = setting("l40s-48", encoder={"actors": 1}, learner={"ranks": 1, "gpus": 0.5, "micro_batch": 8})
    found = changes(tight)
    assert [c.name for c in found if c.fits] == [
        "activation checkpointing and shards in host memory and an adapter instead of all weights",
        "another GPU",
    ]
    together = next(c for c in found if c.fits)
    assert together.keys == ("learner.recompute=true", "learner.offload=true", "model.lora.rank=32", "model.lora.alpha=64")


def test_too_few_gpus() -> None:
    crowded = setting(learner={"ranks": 4, "gpus": 1}, rollout={"groups_per_step": 8, "group_size": 8, "gpus": 1, "generators": 4}, count=4)
    assert [c.keys for c in changes(crowded)] == [("--gpus 8",)]


def test_names_of_gpus() -> None:
    assert gpu_of("a100-40").memory == 40e9
    with pytest.raises(ConfigError, match="h100-80"):
        gpu_of("h100")
