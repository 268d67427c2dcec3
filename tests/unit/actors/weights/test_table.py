"""The table of a version: slices that cover every tensor once make it; anything else is refused with what is wrong."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.weights.table import Entry, Shard, TableError, complete, overlap

ROOT = Path(__file__).resolve().parents[4]


def rows(name: str, start: int, size: int, whole: int = 10, where: str = "part") -> Entry:
    return Entry(name, (whole, 3), (start, 0), (size, 3), "float32", f"{start}", where)


def shards(*cuts: tuple[Entry, ...]) -> list[Shard]:
    return [Shard(1, 7, rank, len(cuts), entries) for rank, entries in enumerate(cuts)]


def test_shards_of_all_ranks_make_a_table() -> None:
    table = complete(shards((rows("b", 0, 4), rows("a", 0, 10)), (rows("b", 4, 6),))[::-1])
    assert table.name == (1, 7)
    assert [(e.name, e.start[0]) for e in table.entries] == [("a", 0), ("b", 0), ("b", 4)]
    assert table.shapes == {"a": (10, 3), "b": (10, 3)}


def test_scalars_and_tensors_without_values_are_whole() -> None:
    table = complete(shards((Entry("step", (), (), (), "int64", "x", "p"), Entry("none", (0, 4), (0, 0), (0, 4), "float32", "x", "p"))))
    assert table.shapes == {"none": (0, 4), "step": ()}


@pytest.mark.parametrize(
    ("cuts", "wrong"),
    [
        (((rows("a", 0, 4),), (rows("a", 5, 5),)), "hold 27 of its 30 values"),
        (((rows("a", 0, 6),), (rows("a", 5, 5),)), "overlap"),
        (((rows("a", 0, 10),), (rows("a", 0, 10),)), "overlap"),
        (((rows("a", 0, 4),), (rows("a", 4, 7),)), "lie outside of its shape"),
        (((rows("a", 0, 5),), (rows("a", 5, 5, whole=11),)), "several shapes or types"),
        (((rows("a", 0, 5),), (replace(rows("a", 5, 5), dtype="bfloat16"),)), "several shapes or types"),
        (((replace(rows("a", 0, 10), start=(0,)),),), "lie outside"),
        (((Entry("s", (), (), (), "int64", "x", "p"),), (Entry("s", (), (), (), "int64", "x", "p"),)), "overlap"),
    ],
)
def test_slices_that_do_not_cover_are_refused(cuts: tuple[tuple[Entry, ...], ...], wrong: str) -> None:
    with pytest.raises(TableError, match=f"version 7: the slices of . .*{wrong}"):
        complete(shards(*cuts))


def test_a_rank_that_is_missing_or_of_another_start_is_refused() -> None:
    two = shards((rows("a", 0, 5),), (rows("a", 5, 5),))
    for wrong in ([two[0]], [two[0], two[0]], [two[0], replace(two[1], lineage=2)], [two[0], replace(two[1], world=3)]):
        with pytest.raises(TableError, match="needs one shard of each of"):
            complete(wrong)


@given(cuts=st.lists(st.integers(1, 6), min_size=1, max_size=6), gap=st.integers(0, 5))
def test_any_cut_into_blocks_of_both_dimensions_is_whole_and_a_missing_block_is_not(cuts: list[int], gap: int) -> None:
    total, entries, start = sum(cuts), [], 0
    for n in cuts:
        entries += [Entry("w", (total, 8), (start, column), (n, 4), "float32", "d", "p") for column in (0, 4)]
        start += n
    assert complete(shards(tuple(entries))).shapes == {"w": (total, 8)}
    del entries[gap % len(entries)]
    with pytest.raises(TableError):
        complete(shards(tuple(entries)))


def test_what_two_slices_share() -> None:
    entry = rows("a", 2, 5)
    assert overlap(entry, (4, 1), (6, 1)) == ((4, 1), (3, 1))
    assert overlap(entry, (7, 0), (3, 3)) is None


def test_a_shard_is_json_and_nothing_else_is_taken_for_one() -> None:
    shard = Shard(2, 9, 1, 4, (rows("a", 0, 10), Entry("s", (), (), (), "int64", "x", "p")), wanted=True)
    assert Shard.loads(shard.dumps()) == shard
    for damage in (b"", b"{}", shard.dumps()[:-5], b'{"lineage": "x"}'):
        with pytest.raises(TableError, match="no table of a shard"):
            Shard.loads(damage)


def test_the_digest_of_a_version_tells_of_every_slice() -> None:
    one = complete(shards((rows("a", 0, 5),), (rows("a", 5, 5),)))
    moved = complete(shards((rows("a", 0, 5, where="elsewhere"),), (rows("a", 5, 5),)))
    other = complete(shards((rows("a", 0, 5),), (replace(rows("a", 5, 5), digest="other"),)))
    assert one.digest == moved.digest != other.digest


def test_the_store_and_its_tables_need_neither_torch_nor_ray() -> None:
    code = "import sys, actors.weights.store; print([m for m in ('torch', 'ray', 'numpy', 'safetensors') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (result.stdout, result.stderr) == ("[]\n", "")
