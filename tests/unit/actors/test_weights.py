"""The weight store: newest wins, a restart forgets nothing that was visible, a store that goes back drops what came after."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from actors.weights.whole import KEEP, VersionGone, Weights, WeightStore, assemble


def weights(version: int, lineage: int = 1) -> Weights:
    return Weights.of(version, save({"w": torch.full((2,), float(version))}), lineage)


def store(folder: Path, *versions: int) -> WeightStore:
    made = WeightStore(str(folder))
    for version in versions:
        made.publish(weights(version))
    return made


def served(made: WeightStore) -> float | None:
    found = made.get()
    return None if found is None else float(found.state()["w"][0])


def test_before_the_first_version_there_is_nothing(tmp_path: Path) -> None:
    made = store(tmp_path / "new" / "folder")
    assert (made.version(), made.get()) == (None, None)
    with pytest.raises(VersionGone, match="version 3 is not kept"):
        made.get(exact=3)


def test_the_newest_version_is_served_unless_the_caller_has_it(tmp_path: Path) -> None:
    made = store(tmp_path, 0, 1, 2)
    assert made.version() == 2
    assert served(made) == 2
    assert made.get(have=(1, 2)) is None
    assert made.get(have=(1, 1)) == weights(2)


def test_the_same_version_of_another_lineage_is_another_thing(tmp_path: Path) -> None:
    """After a return to a checkpoint, version 2 is trained again and is not what a sampler already has."""
    made = store(tmp_path, 1, 2)
    made.publish(weights(2, lineage=2))
    assert made.get(have=(1, 2)) == weights(2, lineage=2)
    assert made.get(have=(2, 2)) is None
    assert WeightStore(str(tmp_path)).get() == weights(2, lineage=2)


def test_a_crash_while_going_back_leaves_the_later_lineage(tmp_path: Path) -> None:
    """The file of the version that was cut off may still lie beside the new one."""
    store(tmp_path, 9)
    cut_off = next(tmp_path.iterdir())
    data = cut_off.read_bytes()
    store(tmp_path).publish(weights(4, lineage=2))
    cut_off.write_bytes(data)
    assert WeightStore(str(tmp_path)).get() == weights(4, lineage=2)


def test_an_older_version_can_be_asked_for_while_it_is_kept(tmp_path: Path) -> None:
    """Another version never stands in for it: an evaluation would then tell of the wrong weights."""
    made = store(tmp_path, *range(10))
    newest = 9
    for version in range(10):
        if version > newest - KEEP:
            assert made.get(have=(1, version), exact=version) == weights(version)
        else:
            with pytest.raises(VersionGone):
                made.get(exact=version)


def test_a_restarted_store_serves_the_newest(tmp_path: Path) -> None:
    store(tmp_path, 0, 1, 2)
    again = WeightStore(str(tmp_path))
    assert again.version() == 2
    assert again.get() == weights(2)
    assert [f.name for f in tmp_path.iterdir()] == ["weights-1-2.safetensors"]


def test_a_half_written_file_is_not_a_version(tmp_path: Path) -> None:
    store(tmp_path, 1)
    (tmp_path / "weights-1-2.partial").write_bytes(b"half")
    assert WeightStore(str(tmp_path)).version() == 1


def test_publishing_an_older_version_drops_the_newer_ones(tmp_path: Path) -> None:
    made = store(tmp_path, 1, 2, 3, 2)
    assert made.version() == 2
    with pytest.raises(VersionGone):
        made.get(exact=3)
    assert made.get(exact=1) == weights(1)
    assert WeightStore(str(tmp_path)).version() == 2


def test_damaged_weights_are_refused() -> None:
    good = weights(3)
    assert torch.equal(good.state()["w"], torch.full((2,), 3.0))
    flipped = bytearray(good.data)
    flipped[-1] ^= 1
    with pytest.raises(ValueError, match="weights of version 3 are damaged: checksum differs"):
        replace(good, data=bytes(flipped)).state()


# -- shards ---------------------------------------------------------------------------------------------------------

WHOLE = {"a": torch.arange(10.0).reshape(5, 2), "b": torch.arange(3.0), "buffer": torch.ones(2, 2)}


def shards(world: int) -> list[dict[str, torch.Tensor]]:
    """As FSDP cuts: ceil(rows / world) rows a rank, the last ranks may have fewer or none; the buffer from rank 0 only."""
    cut: list[dict[str, torch.Tensor]] = []
    for rank in range(world):
        part = {}
        for name in ("a", "b"):
            rows = -(-len(WHOLE[name]) // world)
            part[name] = WHOLE[name][rank * rows : (rank + 1) * rows].contiguous()
        cut.append(part | ({"buffer": WHOLE["buffer"]} if rank == 0 else {}))
    return cut


def is_whole(state: dict[str, torch.Tensor]) -> bool:
    return state.keys() == WHOLE.keys() and all(torch.equal(state[k], WHOLE[k]) for k in WHOLE)


@given(world=st.integers(1, 7))
def test_shards_assemble(world: int) -> None:
    assert is_whole(assemble(shards(world)))


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_a_version_is_visible_with_its_last_shard(order: list[int], tmp_path: Path) -> None:
    made, parts = WeightStore(str(tmp_path)), shards(3)
    for rank in order[:2]:
        assert not made.publish_shard(5, 1, rank, 3, save(parts[rank]))
        assert made.version() is None
    assert made.publish_shard(5, 1, order[2], 3, save(parts[order[2]]))
    assert made.version() == 5
    assert is_whole(made.get().state())  # type: ignore[union-attr]


def test_shards_of_another_start_of_the_learner_are_not_mixed_in(tmp_path: Path) -> None:
    made, parts = WeightStore(str(tmp_path)), shards(2)
    stale = {k: v + 100 for k, v in parts[0].items()}
    assert not made.publish_shard(5, 1, 0, 2, save(stale))
    assert not made.publish_shard(5, 2, 1, 2, save(parts[1]))
    assert made.publish_shard(5, 2, 0, 2, save(parts[0]))
    assert is_whole(made.get().state())  # type: ignore[union-attr]


def test_a_shard_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    made, parts = WeightStore(str(tmp_path)), shards(2)
    assert not made.publish_shard(5, 1, 0, 2, save(parts[0]))
    assert not made.publish_shard(5, 1, 0, 2, save(parts[0]))
    assert made.publish_shard(5, 1, 1, 2, save(parts[1]))


def test_a_restart_between_two_shards_loses_neither(tmp_path: Path) -> None:
    """Rank 0 has its answer and does not send again: a store that forgets its shard never completes the version."""
    parts = shards(2)
    assert not WeightStore(str(tmp_path)).publish_shard(5, 1, 0, 2, save(parts[0]))
    assert WeightStore(str(tmp_path)).publish_shard(5, 1, 1, 2, save(parts[1]))


def test_a_last_shard_that_is_retried_after_a_restart_is_still_the_last(tmp_path: Path) -> None:
    """Ray calls again when the store died before it answered; the caller must hear that the version is complete."""
    made, parts = WeightStore(str(tmp_path)), shards(2)
    made.publish_shard(5, 1, 0, 2, save(parts[0]))
    made.publish_shard(5, 1, 1, 2, save(parts[1]))
    assert WeightStore(str(tmp_path)).publish_shard(5, 1, 1, 2, save(parts[1]))
