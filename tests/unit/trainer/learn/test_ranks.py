"""Two real gloo ranks against one: losses, gradient norm, weights, optimiser, average, resharded checkpoints, exports.

The two ranks run every scenario of `ranks.py` once, in processes of their own, while the one rank of this process does the
same. What a group computes may not depend on how many ranks it has.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion.checkpoint import load_network
from diffusion.config import ModelConfig
from diffusion.weights import WEIGHTS
from tests.gloo import alone, launched
from tests.unit.trainer.learn.claims import assert_handed_in, assert_same, assert_same_state, assert_same_updates, write_claim, write_policy
from tests.unit.trainer.learn.ranks import SAVED, SCENARIOS, STARTS, UPDATES, checkpoint_of, resumed, scenario, transport_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ranks")
    write_policy(made)
    for name in SCENARIOS:
        write_claim(made, name)
    return made


@pytest.fixture(scope="module")
def one(folder: Path) -> Iterator[dict[str, Any]]:
    """What one rank makes of every scenario; its group stays for the tests."""
    with alone():
        yield {name: scenario(name, folder, 0, 1) for name in SCENARIOS}


@pytest.fixture(scope="module")
def two(folder: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What two ranks make of it, each as it sees it."""
    return launched("tests.unit.trainer.learn.ranks", 2, folder)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_ranks_compute_what_one_does(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_same_updates(rank[name]["said"], one[name]["said"])
        assert_same_state(name, rank[name]["state"], one[name]["state"])
    said = one[name]["said"]
    assert all(s["grad_norm"] > 1e-5 and not s["skipped"] for s in said)  # the scenario moves something
    if name.startswith("finished"):
        assert said[0]["old_kl"] == 0
        assert said[-1]["old_kl"] > 1e-9
        assert "ratio_deviation" not in said[0]
        return
    assert said[0]["ratio_deviation"] > 1e-4
    assert 0 < said[0]["clip_fraction"] < 1 or name != "plain"
    assert "kl_weight" not in SCENARIOS[name].sections.get("objective", {}) or said[-1]["reverse_kl"] > 1e-7


def test_recomputing_changes_no_bit_on_one_rank_or_two(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for found in (one, *two):
        recomputed, plain = ({part: found[name][part] for part in ("said", "state")} for name in ("recomputed", "plain"))
        assert_same(recomputed, plain, rtol=0)


def test_shards_in_host_memory_change_no_bit_on_one_rank_or_two(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """On CPUs they lie where they lay; the way through FSDP's offloading is another."""
    for found in (one, *two):
        offloaded, plain = ({part: found[name][part] for part in ("said", "state")} for name in ("in host memory", "plain"))
        assert_same(offloaded, plain, rtol=0)


def test_moments_in_8_bits_stay_near_those_in_fp32(one: dict[str, Any]) -> None:
    low, full = (one[name]["state"] for name in ("moments in 8 bits", "plain"))
    codes = [t for moments in low["optimizer"].values() for t in moments.values() if t.dtype == torch.uint8]
    exact = [t for moments in low["optimizer"].values() for n, t in moments.items() if n.startswith("exp_avg") and "scale" not in n and t.dtype != torch.uint8]
    assert sum(t.numel() for t in codes) > sum(t.numel() for t in exact)  # most values, in a policy this small
    moved = {n: (t - full["model"][n]).abs().max() / 5e-3 for n, t in low["model"].items()}
    assert 0 < max(moved.values()) < 0.05  # of a step of Adam's


def test_gradients_may_stay_sharded_while_passes_accumulate(two: list[dict[str, Any]]) -> None:
    for found in two:
        sharded, whole = ({part: found[name][part] for part in ("said", "state")} for name in ("sharded gradients", "padding rows"))
        assert_same(sharded, whole, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", SCENARIOS)
def test_what_ranks_hand_in_is_the_trained_policy_to_the_bit(name: str, folder: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """Whoever cut it: FSDP's shards, uneven ones too."""
    for ranks in ([one[name]], [rank[name] for rank in two]):
        assert_handed_in(ranks, transport_of(folder, name, len(ranks)))


def test_a_gradient_above_the_limit_is_scaled_by_the_norm_of_all_ranks(one: dict[str, Any]) -> None:
    said = one["clipped gradient in one unit"]["said"]
    assert said[0]["grad_norm"] > 2 * 0.02


@pytest.mark.parametrize("name", STARTS)
def test_two_ranks_start_from_the_network_that_one_process_loads(name: str, folder: Path, two: list[dict[str, Any]]) -> None:
    """To the bit, and of the files each rank has read its own part alone."""
    config = ModelConfig(**{"path": str(folder / "policy"), **STARTS[name]})
    expected = load_network(config)[0].state_dict()
    for rank in two:
        found = rank["starts"][name]
        assert found["state"].keys() == expected.keys()
        for state in (found["state"], found["average"]):
            assert all(torch.equal(state[n], value) and state[n].dtype == value.dtype for n, value in expected.items())
        assert found["read"] == (0 if config.init else found["own"])
    parameters = sum(t.numel() for n, t in expected.items() if ".lora_" not in n and n != "pos_embed.pos_embed")
    assert sum(rank["starts"][name]["own"] for rank in two) == parameters


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_one_rank_is_loaded_by_two(name: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert_same(rank[f"{name}, resumed"]["state"], one[name]["state"], rtol=0)
        assert_same_updates(rank[f"{name}, resumed"]["next"], one[name]["next"])
        assert_same_state(name, rank[f"{name}, resumed"]["next state"], one[name]["next state"])


@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_of_two_ranks_is_loaded_by_one(name: str, folder: Path, two: list[dict[str, Any]]) -> None:
    found = resumed(name, folder, saved_by=2)
    assert (found["progress"].step, found["progress"].groups, found["progress"].data) == (UPDATES, [1, 2], [3])
    assert_same(found["state"], two[0][name]["state"], rtol=0)
    assert_same_updates(found["next"], two[0][name]["next"])
    assert_same_state(name, found["next state"], two[0][name]["next state"])


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", SAVED)
def test_a_checkpoint_in_the_background_is_to_the_byte_the_one_that_ranks_wait_for(name: str, world: int, folder: Path, two: list[dict[str, Any]]) -> None:
    """Though the ranks had made an update more, in place, before it began."""
    waited, trained = (checkpoint_of(folder, name, world, background) for background in (False, True))
    shards = {f"__{rank}_0.distcp" for rank in range(world)}
    assert {f.name for f in waited.iterdir()} == {f.name for f in trained.iterdir()} == {".metadata", "progress.json", *shards}
    assert all((waited / file).read_bytes() == (trained / file).read_bytes() for file in (*shards, "progress.json"))


def test_ranks_do_not_wait_for_a_slow_checkpoint(two: list[dict[str, Any]]) -> None:
    """Nothing of the checkpoint of step 0 was on disk when both ranks had made two updates more; it holds what they had before."""
    for rank in two:
        seen = rank["slow checkpoint"]
        assert len(seen["said"]) == 2
        assert seen["written"] == []
        assert seen["names"] == ["step-000000", "step-000002"]
        assert_same(seen["loaded"], seen["states"], rtol=0)
        assert seen["states"][0]["model"].keys() == seen["states"][1]["model"].keys()
        assert any(not torch.equal(value, seen["states"][1]["model"][name]) for name, value in seen["states"][0]["model"].items())


def test_a_checkpoint_that_one_rank_cannot_write_fails_on_both(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert "could not be written (rank 1: NotADirectoryError" in rank["failed checkpoints"]["barred"]
        assert "the run folder must be shared by all nodes" in rank["failed checkpoints"]["elsewhere"]


def test_a_run_that_has_grown_goes_on_at_the_rate_it_had(folder: Path, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    """The cosine of a run of 10 updates, resumed with 50: the schedule keeps its length."""
    rates = [s["lr"] for s in one["plain"]["said"] + one["plain"]["next"]]
    assert rates == sorted(rates, reverse=True)
    assert two[0]["plain, resumed"]["next"][0]["lr"] == rates[-1] < 0.7 * SCENARIOS["plain"].config(folder).optimizer.lr


def test_a_gradient_that_is_no_number_on_one_rank_skips_the_update_on_all(two: list[dict[str, Any]]) -> None:
    for rank in two:
        assert rank["poisoned"]["said"]["skipped"] == 1
        assert_same(rank["poisoned"]["state"], rank["poisoned"]["before"], rtol=0)


def test_ranks_do_not_wait_for_a_slow_export(folder: Path, two: list[dict[str, Any]]) -> None:
    """The writer of step 7 ends only after both ranks have made another update, and writes what was taken before it. The copy
    of step 8 gave way to that of step 9; a restart that found step 11 missing made it."""
    seen, exports = two[0]["slow export"], folder / "exports"
    assert sorted(f.name for f in exports.iterdir()) == ["step-000009", "step-000009-ema", "step-000011", "step-000011-ema"]
    assert_same(load_file(exports / "step-000009" / "transformer" / WEIGHTS), seen["last"]["model"], rtol=0)
    assert_same(load_file(exports / "step-000009-ema" / "transformer" / WEIGHTS), seen["last"]["average"], rtol=0)
    assert_same(load_file(exports / "step-000011" / "transformer" / WEIGHTS), seen["exported"]["model"], rtol=0)
