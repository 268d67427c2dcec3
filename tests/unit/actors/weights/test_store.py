"""The weight store: newest wins, a version is seen when every rank has handed in, a restart forgets nothing that lies in a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from actors.weights.shards import Slice, write_slices
from actors.weights.store import KEEP, Superseded, VersionGone, View, WeightStore
from actors.weights.table import Shard, TableError
from actors.weights.transport import FolderTransport, ObjectTransport


def shard(folder: Path, version: int, lineage: int = 1, rank: int = 0, world: int = 1, wanted: bool = False, value: float | None = None) -> Shard:
    """A rank's shard of `w`, three rows a rank, each `value` (the version)."""
    rows = torch.full((3,), float(version if value is None else value))
    slices: list[Slice] = [("w", (3 * world,), (3 * rank,), rows)]
    return write_slices(FolderTransport(str(folder)), iter(slices), (lineage, version), rank, world, wanted=wanted)[0]


def publish(store: WeightStore, folder: Path, version: int, lineage: int = 1, wanted: bool = False) -> None:
    assert store.hand_in(shard(folder, version, lineage, wanted=wanted), {})


def made(folder: Path, *versions: int) -> WeightStore:
    store = WeightStore(FolderTransport(str(folder)))
    for version in versions:
        publish(store, folder, version)
    return store


def read(view: View | None) -> list[float]:
    assert view is not None
    return [value for _, _, piece in view.open(5.0).pieces() for value in piece.tolist()]


def versions_on_disk(folder: Path) -> set[str]:
    return {f.name for f in folder.iterdir()}


def test_before_the_first_version_there_is_nothing(tmp_path: Path) -> None:
    store = made(tmp_path / "new" / "folder")
    assert (store.version(), store.view()) == (None, None)
    with pytest.raises(VersionGone, match="version 3 is not kept"):
        store.view(exact=3)


def test_the_newest_version_is_served_unless_the_caller_has_it(tmp_path: Path) -> None:
    store = made(tmp_path, 0, 1, 2)
    assert store.version() == 2
    assert read(store.view()) == [2, 2, 2]
    assert store.view(have=(1, 2)) is None
    assert read(store.view(have=(1, 1))) == [2, 2, 2]


def test_the_same_version_of_another_lineage_is_another_thing(tmp_path: Path) -> None:
    """After a return to a checkpoint, version 2 is trained again and is not what a sampler already has."""
    store = made(tmp_path, 1, 2)
    publish(store, tmp_path, 2, lineage=2)
    found = store.view(have=(1, 2))
    assert found is not None
    assert found.table.name == (2, 2)
    assert store.view(have=(2, 2)) is None
    again = WeightStore(FolderTransport(str(tmp_path))).view()
    assert again is not None
    assert again.table.name == (2, 2)


def test_a_return_to_a_checkpoint_drops_what_came_after(tmp_path: Path) -> None:
    store = made(tmp_path, 2, 3)
    publish(store, tmp_path, 3, lineage=2)
    assert [store.stands(name) for name in ((1, 2), (1, 3), (2, 3))] == [True, False, True]
    publish(store, tmp_path, 2, lineage=3)
    assert store.version() == 2
    with pytest.raises(VersionGone, match=r"version 3 is not kept any more; the store has \[2\]"):
        store.view(exact=3)
    assert versions_on_disk(tmp_path) == {"3-2"}


def test_a_crash_while_going_back_leaves_the_later_lineage(tmp_path: Path) -> None:
    """The files of the version that was cut off may still lie beside the new one."""
    made(tmp_path, 9)
    other = tmp_path / "other"
    store = made(other)
    publish(store, other, 4, lineage=2)
    (other / "2-4").rename(tmp_path / "2-4")
    other.rmdir()
    store = made(tmp_path)
    assert store.version() == 4
    assert versions_on_disk(tmp_path) == {"2-4"}


def test_the_newest_versions_are_kept_and_those_that_an_evaluation_waits_for(tmp_path: Path) -> None:
    """Another version never stands in for the one asked for: an evaluation would then tell of the wrong weights."""
    store = made(tmp_path)
    for version in range(10):
        publish(store, tmp_path, version, wanted=version in (3, 6))
    kept = {3, 6, *range(10 - KEEP, 10)}
    for version in range(10):
        if version in kept:
            assert read(store.view(have=(1, version), exact=version)) == [version] * 3
        else:
            with pytest.raises(VersionGone):
                store.view(exact=version)
    assert versions_on_disk(tmp_path) == {f"1-{version}" for version in kept}
    store.release(3)
    store.release(3)  # asked again
    store.release(9)  # the newest stays
    assert versions_on_disk(tmp_path) == {f"1-{version}" for version in kept - {3}}
    assert store.version() == 9


def test_a_restarted_store_serves_what_it_served(tmp_path: Path) -> None:
    store = made(tmp_path)
    for version in range(5):
        publish(store, tmp_path, version, wanted=version in (0, 1))
    store.release(1)
    again = WeightStore(FolderTransport(str(tmp_path)))
    assert again.version() == 4
    assert [read(again.view(exact=v)) for v in (0, 3, 4)] == [[v] * 3 for v in (0, 3, 4)]
    again.release(0)
    assert versions_on_disk(tmp_path) == {"1-3", "1-4"}


def test_a_release_outlives_a_restart(tmp_path: Path) -> None:
    store = made(tmp_path, 0)
    publish(store, tmp_path, 1, wanted=True)
    store.release(1)
    again = made(tmp_path, 2, 3)
    assert not again.stands((1, 1))


def test_a_driver_that_starts_again_releases_what_its_former_self_waited_for(tmp_path: Path) -> None:
    store = made(tmp_path)
    for version in range(5):
        publish(store, tmp_path, version, wanted=True)
    again = made(tmp_path)
    again.release()
    assert versions_on_disk(tmp_path) == {"1-3", "1-4"}


def test_what_no_store_knows_of_is_swept(tmp_path: Path) -> None:
    """Parts of a rank that died before it could hand in; what others keep there is not touched."""
    shard(tmp_path, 1, lineage=1)
    (tmp_path / "notes-of-mine").mkdir()
    store = made(tmp_path)
    assert store.version() is None
    publish(store, tmp_path, 1, lineage=2)
    assert versions_on_disk(tmp_path) == {"2-1", "notes-of-mine"}


# -- shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1], [1, 2, 0]])
def test_a_version_is_visible_with_its_last_shard(order: list[int], tmp_path: Path) -> None:
    store = made(tmp_path, 4)
    for rank in order[:2]:
        assert not store.hand_in(shard(tmp_path, 5, rank=rank, world=3), {})
        assert store.version() == 4
    assert store.hand_in(shard(tmp_path, 5, rank=order[2], world=3), {})
    assert read(store.view()) == [5] * 9


def test_shards_of_another_start_of_the_learner_are_not_mixed_in(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert not store.hand_in(shard(tmp_path, 5, rank=0, world=2, value=100), {})
    assert not store.hand_in(shard(tmp_path, 5, lineage=2, rank=1, world=2), {})
    assert versions_on_disk(tmp_path) == {"2-5"}
    assert store.hand_in(shard(tmp_path, 5, lineage=2, rank=0, world=2), {})
    assert read(store.view()) == [5] * 6


def test_a_rank_of_a_group_that_was_started_again_is_refused(tmp_path: Path) -> None:
    """It would otherwise put weights of a history that was cut off before those of the present one."""
    store = made(tmp_path)
    publish(store, tmp_path, 4, lineage=2)
    with pytest.raises(Superseded, match="version 7 is of start 1 of the learner, and start 2 has handed in already"):
        store.hand_in(shard(tmp_path, 7, lineage=1), {})
    assert store.version() == 4
    assert versions_on_disk(tmp_path) == {"2-4"}


def test_a_shard_that_is_sent_again_counts_once(tmp_path: Path) -> None:
    store = made(tmp_path)
    assert not store.hand_in(shard(tmp_path, 5, rank=0, world=2), {})
    assert not store.hand_in(shard(tmp_path, 5, rank=0, world=2), {})
    assert store.hand_in(shard(tmp_path, 5, rank=1, world=2), {})


def test_a_shard_that_is_sent_again_late_brings_nothing_back(tmp_path: Path) -> None:
    store = made(tmp_path, 5, 6)
    assert store.hand_in(shard(tmp_path, 5), {})
    assert store.version() == 6
    assert not made(tmp_path, 7, 8).hand_in(shard(tmp_path, 5), {})


def test_a_restart_between_two_shards_loses_neither(tmp_path: Path) -> None:
    """Rank 0 has its answer and does not send again: a store that forgets its shard never completes the version."""
    assert not made(tmp_path).hand_in(shard(tmp_path, 5, rank=0, world=2), {})
    assert made(tmp_path).hand_in(shard(tmp_path, 5, rank=1, world=2), {})


def test_a_last_shard_that_is_retried_after_a_restart_is_still_the_last(tmp_path: Path) -> None:
    """Ray calls again when the store died before it answered; the caller must hear that the version is complete."""
    store = made(tmp_path)
    parts = [shard(tmp_path, 5, rank=rank, world=2) for rank in range(2)]
    for part in parts:
        store.hand_in(part, {})
    assert made(tmp_path).hand_in(parts[1], {})


def test_shards_that_make_no_version_are_refused_and_the_older_one_stays(tmp_path: Path) -> None:
    store = made(tmp_path, 4)
    slices: list[Slice] = [("w", (6,), (2,), torch.ones(3))]
    assert not store.hand_in(shard(tmp_path, 5, rank=0, world=2), {})
    overlapping = write_slices(FolderTransport(str(tmp_path)), iter(slices), (1, 5), 1, 2)[0]
    with pytest.raises(TableError, match="the slices of w overlap"):
        store.hand_in(overlapping, {})
    assert store.version() == 4
    assert versions_on_disk(tmp_path) == {"1-4"}


def test_a_version_that_cannot_be_read_is_not_served_and_may_be_handed_in_again(tmp_path: Path) -> None:
    store = made(tmp_path, 4, 5)
    store.lost((1, 5), "a part is lost")
    store.lost((1, 5), "a part is lost")
    assert (store.version(), store.stands((1, 5))) == (4, False)
    assert store.view(have=(1, 5)) is None  # who has it does not go back
    publish(store, tmp_path, 5)
    assert store.stands((1, 5))
    assert read(store.view(have=(1, 4))) == [5] * 3


def test_a_store_of_objects_starts_empty(tmp_path: Path) -> None:
    store = WeightStore(ObjectTransport())
    assert store.hand_in(shard(tmp_path, 5), {"part": "reference"})
    found = store.view()
    assert found is not None
    assert found.objects == {"part": "reference"}
    store.release(5)
    assert WeightStore(ObjectTransport()).version() is None
