"""The wire format: what is encoded comes back, what is damaged does not."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from actors.members import GroupMembers, MemberRow, SampleMembers
from actors.payload import FORMAT, Buffer, DataPayload, GroupPayload, PayloadError, count_of, decode_data, decode_group, decode_samples, encode

SIZE = st.integers(1, 4)


def group(n: int = 2, k: int = 3, c: int = 3, h: int = 4, w: int = 5, text: str = "a cat", seed: int = 0) -> GroupPayload:
    g = torch.Generator().manual_seed(seed)
    return GroupPayload(
        text=text,
        x=torch.randn(n, k, c, h, w, generator=g),
        x_next=torch.randn(n, k, c, h, w, generator=g),
        log_prob=torch.randn(n, k, generator=g, dtype=torch.float64),
        trained=torch.arange(k),
        times=torch.linspace(1, 0, k + 2),
    )


def two_step(frames: int = 0, seed: int = 0) -> GroupPayload:
    """A group of a two-step kernel; with `frames`, of video."""
    plain = group(seed=seed)
    if frames:
        clip = torch.randn(2, 3, 3, frames, 4, 5, generator=torch.Generator().manual_seed(seed))
        return replace(plain, x=clip, x_next=clip + 1, previous=clip - 1)
    return replace(plain, previous=plain.x - 1)


def data(rows: int = 3, seed: int = 0) -> DataPayload:
    g = torch.Generator().manual_seed(seed)
    return DataPayload(tuple(f"caption {i}" for i in range(rows)), torch.randn(rows, 3, 4, 5, generator=g))


def decode_all(segments: Sequence[Buffer]) -> DataPayload:
    return decode_data(segments, range(len(segments) - 1))


def equal(a: GroupPayload | DataPayload, b: GroupPayload | DataPayload) -> bool:
    pairs = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)]
    return type(a) is type(b) and all(torch.equal(p, q) if isinstance(p, Tensor) and isinstance(q, Tensor) else p == q for p, q in pairs)


@given(n=SIZE, k=SIZE, c=SIZE, h=SIZE, w=SIZE, text=st.text(), seed=st.integers(0, 99))
@settings(max_examples=50)
def test_a_group_comes_back(n: int, k: int, c: int, h: int, w: int, text: str, seed: int) -> None:
    payload = group(n, k, c, h, w, text, seed)
    assert equal(decode_group(encode(payload)), payload)


@given(rows=SIZE, seed=st.integers(0, 99))
@settings(max_examples=25)
def test_a_data_batch_comes_back(rows: int, seed: int) -> None:
    payload = data(rows, seed)
    assert equal(decode_data(encode(payload), range(rows)), payload)


@pytest.mark.parametrize("frames", [0, 1, 3])
def test_predictions_of_the_step_before_and_video_come_back(frames: int) -> None:
    payload = two_step(frames)
    assert equal(decode_group(encode(payload)), payload)
    without = replace(payload, previous=None)
    back = decode_group(encode(without))
    assert back.previous is None
    assert equal(back, without)
    clips = DataPayload(("a", "b"), torch.zeros(2, 3, 4, 5, 6))
    assert equal(decode_data(encode(clips), range(2)), clips)


@pytest.mark.parametrize("frames", [0, 3])
def test_samples_of_a_group_come_back_all_or_some(frames: int) -> None:
    g = torch.Generator().manual_seed(0)
    shape, times = (4, *[frames] * (frames > 0), 5, 6), torch.linspace(1, 0, 5)
    samples, own = list(torch.randn(3, *shape, generator=g)), torch.randn(4, *[frames + 1] * (frames > 0), 5, 6, generator=g)
    for x0 in (None, own):
        segments = encode(SampleMembers("a cat", samples, times, x0))
        assert count_of(segments[0]) == 3
        found = decode_samples([segments[0], segments[1], segments[3]])
        assert (found.text, found.times.tolist()) == ("a cat", times.tolist())
        assert torch.equal(found.sample, torch.stack([samples[0], samples[2]]))
        assert (found.x0 is None) if x0 is None else torch.equal(found.x0, x0)  # type: ignore[arg-type]
    assert len(segments[1]) == samples[0].numel() * 4


def test_samples_that_differ_or_are_of_another_size_than_their_datum_are_refused() -> None:
    one, times = torch.zeros(3, 4, 5), torch.linspace(1, 0, 5)
    for samples in ([one, one[:, :3]], [one, one.double()], [one.double()] * 2, []):
        with pytest.raises(PayloadError, match="samples of a group must be float32 of one shape"):
            encode(SampleMembers("a cat", samples, times))
    segments = encode(SampleMembers("a cat", [one], times, torch.zeros(3, 4, 6)))
    with pytest.raises(PayloadError, match="own datum is not of the size of its samples"):
        decode_samples(segments)


def test_views_and_non_finite_values_come_back() -> None:
    payload = group()
    views = replace(payload, x=payload.x.transpose(3, 4).contiguous().transpose(3, 4), x_next=payload.x_next[:1].expand(2, -1, -1, -1, -1))
    assert equal(decode_group(encode(views)), views)
    odd = replace(payload, log_prob=torch.tensor([[torch.inf, -torch.inf, 1e-45]] * 2, dtype=torch.float64))
    assert equal(decode_group(encode(odd)), odd)


@given(n=SIZE, k=SIZE, chosen=st.data())
@settings(max_examples=25)
def test_some_members_come_back_by_themselves(n: int, k: int, chosen: st.DataObject) -> None:
    payload = group(n, k)
    own = chosen.draw(st.lists(st.integers(0, n - 1), unique=True).map(sorted))
    segments = encode(payload)
    found = decode_group([segments[0], *(segments[1 + m] for m in own)])
    assert equal(found, replace(payload, x=payload.x[own], x_next=payload.x_next[own], log_prob=payload.log_prob[own]))
    batch, parts = data(n), encode(data(n))
    some = range(own[0], own[-1] + 1) if own else range(0)
    rows = decode_data([parts[0], *(parts[1 + m] for m in some)], some)
    assert equal(rows, DataPayload(batch.texts[some.start : some.stop], batch.x0[some.start : some.stop]))
    assert count_of(segments[0]) == count_of(parts[0]) == n == len(segments) - 1 == len(parts) - 1


def test_a_member_is_its_tensors_one_behind_the_other() -> None:
    payload = group(n=2, k=3)
    head, first, second = encode(payload)
    table = json.loads(bytes(load(bytes(head))["table"].tolist()))
    assert table == {
        "count": 2,
        "texts": ["a cat"],
        "rows": [["log_prob", "float64", [3]], ["states", "float32", [6, 3, 4, 5]]],
        "x": [0, 2, 4],
        "x_next": [1, 3, 5],
    }
    assert len(first) == len(second) == 3 * 8 + 6 * 60 * 4
    assert torch.equal(torch.frombuffer(second, dtype=torch.float32, offset=24 + 120 * 4, count=60).reshape(3, 4, 5), payload.x[1, 1])


def chain(trained: list[int], seed: int = 0) -> GroupPayload:
    """A group as the engine samples it: a step ends where the next one begins."""
    states = torch.randn(2, 8, 3, 4, 5, generator=torch.Generator().manual_seed(seed))
    after = [step + 1 for step in trained]
    plain = group(k=len(trained), seed=seed)
    return replace(plain, x=states[:, trained], x_next=states[:, after], trained=torch.tensor(trained))


@given(trained=st.lists(st.integers(0, 6), min_size=1, max_size=5, unique=True).map(sorted))
@settings(max_examples=40)
def test_steps_that_follow_each_other_share_a_state(trained: list[int]) -> None:
    payload = chain(trained)
    segments = encode(payload)
    assert equal(decode_group(segments), payload)
    states = len({*trained, *(step + 1 for step in trained)})
    assert len(segments[1]) == 8 * len(trained) + 60 * 4 * states
    assert equal(decode_group([segments[0], segments[2]]), replace(payload, x=payload.x[1:], x_next=payload.x_next[1:], log_prob=payload.log_prob[1:]))


def test_states_in_half_the_bytes_are_the_states_that_were_sampled() -> None:
    payload = chain([0, 1, 3])
    with pytest.raises(PayloadError, match=r"no values of torch\.bfloat16: rollouts must be sampled with the replay\.store_dtype"):
        encode(payload, torch.bfloat16)
    rounded = replace(payload, x=payload.x.bfloat16().float(), x_next=payload.x_next.bfloat16().float(), previous=torch.zeros_like(payload.x))
    segments = encode(rounded, torch.bfloat16)
    assert equal(decode_group(segments), rounded)
    assert len(segments[1]) == 8 * 3 + 60 * 2 * (5 + 3)
    with pytest.raises(PayloadError, match="no values"):
        encode(replace(rounded, previous=payload.x), torch.bfloat16)


@pytest.mark.parametrize("places", [[0, 2, 6], [], [-1, 0, 1], [0, 2]])
def test_a_table_that_points_elsewhere_is_refused(places: list[int]) -> None:
    head, *members = encode(group())
    tensors = load(bytes(head))
    table = json.loads(bytes(tensors["table"].tolist())) | {"x": places}
    tensors["table"] = torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)
    with pytest.raises(PayloadError):
        decode_group([save(tensors), *members])


@pytest.mark.parametrize("damage", [lambda b: b"", lambda b: b[: len(b) // 2], lambda b: b"\xff" * 40, lambda b: b[8:], lambda b: b + b"x"])
def test_damaged_bytes_are_refused(damage: Any) -> None:
    for payload, decode in ((group(), decode_group), (data(), decode_all)):
        head, *rest = encode(payload)
        with pytest.raises(PayloadError, match="payload is not safetensors"):
            decode([damage(head), *rest])
        with pytest.raises(PayloadError, match="bytes, its table says"):
            decode([head, *rest[:-1], damage(rest[-1])])


@given(cut=st.integers(0, 400))
@settings(max_examples=40)
def test_a_cut_anywhere_is_noticed(cut: int) -> None:
    head, *rows = encode(data())
    with pytest.raises(PayloadError):
        decode_all([head[: min(cut, len(head) - 1)], *rows])


@pytest.mark.parametrize("version", [None, [FORMAT + 1], [FORMAT, FORMAT], [3]])
def test_another_version_is_refused(version: list[int] | None) -> None:
    head, *members = encode(group())
    tensors = load(bytes(head))
    del tensors["format"]
    if version is not None:
        tensors["format"] = torch.tensor(version)
    with pytest.raises(PayloadError, match="it was written by another version of ddrl: finish the run with that one"):
        decode_group([save(tensors), *members])


@pytest.mark.parametrize("table", [None, "[]", "{", '{"count": 2}', '{"count": 2, "rows": [["x", "int3", [1]]]}', '{"count": 2, "rows": [["x"]]}'])
def test_a_table_that_cannot_be_read_is_refused(table: str | None) -> None:
    head, *members = encode(group())
    tensors = load(bytes(head))
    del tensors["table"]
    if table is not None:
        tensors["table"] = torch.tensor(list(table.encode()), dtype=torch.uint8)
    with pytest.raises(PayloadError, match="the table of a payload cannot be read"):
        decode_group([save(tensors), *members])


def test_the_other_kind_is_refused() -> None:
    with pytest.raises(PayloadError, match="a group has one prompt, its table names 3"):
        decode_group(encode(data()))
    with pytest.raises(PayloadError, match="GroupPayload needs tensors of dimensions"):
        decode_group(encode(data(1)))
    with pytest.raises(PayloadError, match="DataPayload needs tensors of dimensions"):
        decode_data(encode(group()), range(2))


CLASHES = {
    "x_next of another shape": {"x_next": torch.zeros(2, 3, 3, 4, 4)},
    "log_prob of another group": {"log_prob": torch.zeros(3, 3, dtype=torch.float64)},
    "other trained steps": {"trained": torch.arange(2)},
    "a dimension too few": {"times": torch.zeros(())},
    "predictions of another shape": {"previous": torch.zeros(2, 3, 3, 4, 4)},
    "predictions of video": {"previous": torch.zeros(2, 3, 3, 2, 4, 5)},
    "states of video, next states of images": {"x": torch.zeros(2, 3, 3, 2, 4, 5)},
}


@pytest.mark.parametrize("name", CLASHES)
def test_clashing_shapes_are_refused(name: str) -> None:
    with pytest.raises(PayloadError):
        decode_group(encode(replace(group(), **CLASHES[name])))


def test_data_rows_without_their_captions_are_refused() -> None:
    with pytest.raises(PayloadError, match="3 rows and 2 captions"):
        encode(replace(data(), texts=("a", "b")))
    segments = encode(data())
    with pytest.raises(PayloadError, match="3 rows with 3 captions was read as 3 of its rows"):
        decode_data(segments, range(1, 4))


@pytest.mark.parametrize("change", [{"x": group().x.double()}, {"trained": torch.arange(3).float()}, {"log_prob": group().log_prob.bfloat16()}])
def test_other_types_than_the_tables_are_refused(change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(PayloadError, match=r"float32|int64|f32|i64"):
        decode_group(encode(replace(group(), **change)))


class Counted(Sequence[MemberRow]):
    """Members of a group that are made as they are asked for; keeps how many were there when the next one was."""

    def __init__(self, whole: GroupPayload) -> None:
        self.whole, self.alive, self.most = whole, list[weakref.ref[Tensor]](), 0

    def __len__(self) -> int:
        return len(self.whole.x)

    def __getitem__(self, i: Any) -> Any:
        if i >= len(self):
            raise IndexError(i)
        self.most = max(self.most, sum(one() is not None for one in self.alive))
        previous = None if self.whole.previous is None else self.whole.previous[i].clone()
        made = MemberRow(self.whole.x[i].clone(), self.whole.x_next[i].clone(), self.whole.log_prob[i], previous)
        self.alive.append(weakref.ref(made.x))
        return made


def test_a_group_is_encoded_a_member_at_a_time() -> None:
    whole = two_step(frames=3)
    whole = replace(
        whole,
        x=torch.cat([whole.x] * 3),
        x_next=torch.cat([whole.x_next] * 3),
        log_prob=torch.cat([whole.log_prob] * 3),
        previous=whole.x.repeat(3, 1, 1, 1, 1, 1),
    )
    members = Counted(whole)
    segments = encode(GroupMembers(whole.text, members, whole.trained, whole.times))
    assert len(members.alive) == 6  # looked at, none kept
    assert list(segments) == list(encode(whole))
    assert members.most <= 1  # beside the one that is made: the one before it, which the loop still names
    assert segments[2] == segments[2]
    assert segments[2] is not segments[2]
    assert segments[-1] == segments[1:][-1]
    with pytest.raises(IndexError):
        segments[7]


def test_members_that_differ_are_refused() -> None:
    whole = group()
    one, other = (MemberRow(whole.x[i], whole.x_next[i], whole.log_prob[i], None) for i in range(2))
    for bad in (
        replace(other, previous=other.x),
        MemberRow(other.x[:2], other.x_next[:2], other.log_prob[:2], None),
        replace(other, x=other.x.bfloat16(), x_next=other.x_next.bfloat16()),
    ):
        with pytest.raises(PayloadError, match="members of a group differ"):
            encode(GroupMembers("a", [one, bad], whole.trained, whole.times))
    with pytest.raises(PayloadError, match="a group has no members"):
        encode(GroupMembers("a", [], whole.trained, whole.times))
    state = torch.randn(4, 3, 4, 5).bfloat16().float()  # shared in one member only: stored twice in both
    chained = MemberRow(state[:3], state[1:], whole.log_prob[0], None)
    found = decode_group(encode(GroupMembers("a", [chained, one], whole.trained, whole.times)))
    assert torch.equal(found.x[0], state[:3])
    assert torch.equal(found.x[1], one.x)


def test_a_member_alone_lies_where_it_was_read_and_halved_states_hold_none_of_the_bytes() -> None:
    whole = group(n=2)
    head, member, _ = encode(whole)
    found = decode_group([head, member])
    where = np.frombuffer(member, np.uint8).ctypes.data
    assert (found.log_prob.data_ptr(), found.x.data_ptr()) == (where, where + 3 * 8)
    halved = replace(whole, x=whole.x.bfloat16().float(), x_next=whole.x_next.bfloat16().float())
    head, member, _ = encode(halved, torch.bfloat16)
    data = np.frombuffer(member, np.uint8)
    kept = weakref.ref(data)
    found = decode_group([head, memoryview(data)])
    del data
    assert kept() is None
    assert torch.equal(found.x, halved.x[:1])
