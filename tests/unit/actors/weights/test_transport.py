"""Ranks write, readers read: whatever the cut, every bit arrives; what is damaged or gone is said, never read."""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor import Shard as Cut
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from actors.weights import shards as module
from actors.weights.reading import Exported, Needs, OpenVersion, open_version
from actors.weights.shards import Slice, local_slices, write_slices
from actors.weights.store import View
from actors.weights.table import Shard, complete
from actors.weights.transport import FolderTransport, WeightsDamaged, WeightsGone

DTYPES = (torch.float32, torch.bfloat16, torch.float64, torch.int64)


def view_of(transport: FolderTransport, parts: list[Shard]) -> View:
    return View(complete(parts), transport, {})


def state_of(version: OpenVersion, dtypes: dict[str, torch.dtype] | None = None) -> dict[str, Tensor]:
    """Put an open version into empty tensors, as a model would."""
    state = {n: torch.full(shape, 77, dtype=(dtypes or {}).get(n, torch.float32)) for n, shape in version.shapes.items()}
    for name, where, piece in version.pieces():
        state[name][where].copy_(piece)
    return state


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@st.composite
def cut_states(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[list[Slice]]]:
    """A random state dict, and random boxes of it dealt to random ranks."""
    world = draw(st.integers(1, 5))
    dealt: list[list[Slice]] = [[] for _ in range(world)]
    state = {}
    for i in range(draw(st.integers(1, 4))):
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        dtype = draw(st.sampled_from(DTYPES))
        g = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        state[f"t{i}"] = tensor = (torch.randn(shape, generator=g, dtype=torch.float64) * 100).to(dtype)
        cuts = [sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))}) if n else [0, 0] for n in shape]
        free = list(range(world))
        boxes = list(itertools.product(*(list(itertools.pairwise(c)) for c in cuts)))
        if len(boxes) > world:  # a rank holds one box of a tensor
            boxes = [tuple((0, n) for n in shape)]
        for box in boxes:
            rank = free.pop(draw(st.integers(0, len(free) - 1)))
            piece = tensor[tuple(slice(a, b) for a, b in box)]
            dealt[rank].append((f"t{i}", shape, tuple(a for a, _ in box), piece))
    return state, dealt


@settings(max_examples=60)
@given(cut=cut_states(), part_bytes=st.sampled_from([1, 64, 1 << 20]))
def test_any_cut_over_any_ranks_arrives_to_the_bit(cut: tuple[dict[str, Tensor], list[list[Slice]]], part_bytes: int) -> None:
    state, dealt = cut
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PART_BYTES", part_bytes)
        transport = FolderTransport(folder)
        parts = [write_slices(transport, iter(slices), (1, 5), rank, len(dealt))[0] for rank, slices in enumerate(dealt)]
        found = open_version(view_of(transport, parts), 5.0)
        assert found.shapes == {n: tuple(t.shape) for n, t in state.items()}
        assert same(state_of(found, {n: t.dtype for n, t in state.items()}), state)


@settings(max_examples=40)
@given(cuts=st.lists(st.integers(1, 5), min_size=1, max_size=4), ask=st.tuples(st.integers(0, 9), st.integers(1, 9), st.integers(0, 3), st.integers(1, 4)))
def test_a_reader_reads_the_slices_that_it_needs(cuts: list[int], ask: tuple[int, int, int, int]) -> None:
    total = sum(cuts)
    first, rows, left, columns = min(ask[0], total - 1), ask[1], ask[2], ask[3]
    rows, columns = min(rows, total - first), min(columns, 4 - left)
    w, other = torch.randn(total, 4), torch.randn(3)
    with tempfile.TemporaryDirectory() as folder:
        transport, parts = FolderTransport(folder), []
        for rank, (start, n) in enumerate(zip(itertools.accumulate([0, *cuts]), cuts, strict=False)):
            slices: list[Slice] = [("w", (total, 4), (start, 0), w[start : start + n])] + ([("other", (3,), (0,), other)] if rank == 0 else [])
            parts.append(write_slices(transport, iter(slices), (1, 5), rank, len(cuts))[0])
        needs: Needs = {"w": ((first, left), (rows, columns))}
        for part in Path(folder).rglob("*.safetensors"):  # what it does not need may even be gone
            stored = load_file(part)
            start = next(e.start[0] for p in parts for e in p.entries if e.where.endswith(part.name))
            if start >= first + rows or start + len(stored["w"]) <= first:
                part.unlink()
        found = state_of(open_version(view_of(transport, parts), 5.0, needs))
        assert same(found, {"w": w[first : first + rows, left : left + columns]})


# -- what a rank hands in ---------------------------------------------------------------------------------------------


@contextmanager
def rank_of(rank: int, world: int) -> Iterator[None]:
    """A rank of a group whose others are not there: nothing here is collective."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    try:
        yield
    finally:
        dist.destroy_process_group()


MESHES = {
    "shards": ((4,), (Cut(0),)),
    "more ranks than rows": ((7,), (Cut(0),)),
    "replicas of shards": ((2, 3), (Replicate(), Cut(0))),
    "two dimensions": ((3, 2), (Cut(0), Cut(1))),
    "replicas only": ((3,), (Replicate(),)),
}


@pytest.mark.parametrize("case", MESHES)
def test_ranks_hand_in_their_own_shards_once(case: str, tmp_path: Path) -> None:
    """Uneven ones too (5 rows over 4 ranks), and of replicas only the first; plain tensors come from rank 0."""
    sizes, placements = MESHES[case]
    world = math.prod(sizes)
    whole = {"w": torch.randn(5, 6), "one": torch.randn(1, 6), "buffer": torch.randn(3)}
    transport, parts = FolderTransport(str(tmp_path)), []
    for rank in range(world):
        with rank_of(rank, world):
            mesh = init_device_mesh("cpu", sizes)
            state: dict[str, Tensor] = {"buffer": whole["buffer"]}
            for name in ("w", "one"):
                shape, start = compute_local_shape_and_global_offset(whole[name].shape, mesh, placements)
                local = whole[name][tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))]
                state[name] = DTensor.from_local(local, mesh, placements, run_check=False, shape=whole[name].shape, stride=whole[name].stride())
            parts.append(write_slices(transport, local_slices(state, rank), (1, 5), rank, world)[0])
    assert same(state_of(open_version(view_of(transport, parts), 5.0)), whole)
    assert [any(e.name == "buffer" for e in p.entries) for p in parts] == [True] + [False] * (world - 1)
    if case == "replicas of shards":
        assert [bool(p.entries) for p in parts] == [True] * 3 + [False] * 3


def test_a_rank_holds_one_part_beside_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PART_BYTES", 4000)
    written: list[int] = []

    class Counting(FolderTransport):
        def write(self, name, part, tensors):  # type: ignore[no-untyped-def]
            written.append(sum(t.nbytes for t in tensors.values()))
            return super().write(name, part, tensors)

    shard, _ = write_slices(Counting(str(tmp_path)), iter([(f"t{i}", (250,), (0,), torch.ones(250)) for i in range(10)]), (1, 5), 0, 1)
    assert written == [4000, 4000, 2000]
    assert len({e.where for e in shard.entries}) == 3


def test_tensors_are_cast_to_what_rollouts_use_and_integers_are_not(tmp_path: Path) -> None:
    transport = FolderTransport(str(tmp_path))
    w = torch.randn(4, 4)
    slices: list[Slice] = [("w", (4, 4), (0, 0), w), ("steps", (), (), torch.tensor(3))]
    shard, _ = write_slices(transport, iter(slices), (1, 5), 0, 1, torch.bfloat16)
    assert {e.name: e.dtype for e in shard.entries} == {"w": "bfloat16", "steps": "int64"}
    assert torch.equal(state_of(open_version(view_of(transport, [shard]), 5.0))["w"], w.bfloat16().float())


# -- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def written(tmp_path: Path) -> View:
    transport = FolderTransport(str(tmp_path))
    slices: list[Slice] = [("a", (100,), (0,), torch.arange(100.0)), ("b", (2, 2), (0, 0), torch.ones(2, 2))]
    return view_of(transport, [write_slices(transport, iter(slices), (1, 5), 0, 1)[0]])


def file_of(view: View) -> Path:
    (file,) = Path(view.transport.path).rglob("*.safetensors")  # type: ignore[attr-defined]
    return file


def test_a_flipped_bit_is_found(written: View) -> None:
    data = bytearray(file_of(written).read_bytes())
    data[-9] ^= 1
    file_of(written).write_bytes(data)
    with pytest.raises(WeightsDamaged, match=r"weights of version 5 are damaged: . in 1-5/rank-0-000\.safetensors: checksum"):
        open_version(written, 5.0)


def test_a_truncated_file_is_damaged_and_a_removed_one_gone(written: View) -> None:
    file = file_of(written)
    data = file.read_bytes()
    file.write_bytes(data[:-40])
    with pytest.raises(WeightsDamaged, match="weights of version 5 are damaged"):
        open_version(written, 5.0)
    file.unlink()
    with pytest.raises(WeightsGone, match=r"weights of version 5 are gone: .*is not there; is weights\.path a folder that every node sees"):
        open_version(written, 5.0)


def test_an_open_version_is_read_to_its_end_whatever_is_removed(written: View) -> None:
    found = open_version(written, 5.0)
    written.transport.forget((1, 5))
    assert not list(Path(written.transport.path).iterdir())  # type: ignore[attr-defined]
    assert torch.equal(state_of(found)["a"], torch.arange(100.0))


def test_a_part_that_is_written_again_leaves_an_open_one_alone(written: View) -> None:
    found = open_version(written, 5.0)
    write_slices(written.transport, iter([("a", (100,), (0,), torch.zeros(100))]), (1, 5), 0, 1)
    assert torch.equal(state_of(found)["a"], torch.arange(100.0))


def test_an_exported_file_is_incoming_weights_too(written: View) -> None:
    found = Exported(9, str(file_of(written)), prefix="").open(5.0)
    assert found.shapes == {"a": (100,), "b": (2, 2)}
    assert {name: (where, tuple(piece.shape)) for name, where, piece in found.pieces()} == {"a": ((), (100,)), "b": ((), (2, 2))}
