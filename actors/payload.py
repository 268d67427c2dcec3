"""The wire format of groups and data batches: a head, then one segment for each member (or row), whose bytes are its tensors.

This is the only encoder and decoder. Segments are what `replay.buffer` reads apart, so a rank fetches the members it trains.
The head is safetensors: what all members share, `format`, and `table`, JSON as bytes: how many members (rows) there are, and
name, type, shape of each tensor of a member; in a segment they follow each other in that order without a gap. It also has the text of
the group or of every row: what the network is conditioned on is made of it by the text encoder, where it is needed, and stored
nowhere. Of a group it names the places among `states` of `x` and of `x_next`: where one trained step follows another, they share a
state.

With `states=torch.bfloat16` states and `previous` are stored in half the bytes. Rollouts must have been sampled through such
values (`replay.store_dtype`): bytes that would change a state, and so its density, are refused.

A group of clips is gigabytes: segments are made when they are asked for and let go by whoever asked, so of a group's bytes there is one member's in
memory, beside what the caller holds of its members.

Members N, trained steps K, latent shape C h w (or C f h w). A group is stored by its steps, or for losses that need none by its samples.

    group   head    trained           i64 [K]              trained step indices
                    times             f32 [steps + 1]      time grid that was sampled on
                    x0                f32 [C, h, w]        clean latent of the group's own example; only with data.pairing: own. Of clips
                                                           it has the frames that are given too, which states have not
            member  log_prob          f64 [K]              exact log-density (mean over entries) under the sampling weights
                    states            f32 [S, C, h, w]     states before and after each trained step (x, x_next), each once
                    previous          f32 [K, C, h, w]     prediction of x0 in the step before; only for kernels that use it
    samples head    times             f32 [steps + 1]      time grid that was sampled on
                    x0                f32 [C, h, w]        as of a group
            member  sample            f32 [C, h, w]        the finished rollout, for losses that noise it anew
    data    row     x0                f32 [C, h, w]        clean latent
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from actors.members import GroupMembers, Member, MemberRow, SampleMembers, Segments

FORMAT = 5

Buffer = bytes | bytearray | memoryview


class PayloadError(ValueError):
    """Bytes that are not a payload of the expected kind and version."""


@dataclass(frozen=True)
class GroupPayload:
    """Trained transitions of members of one group, all or some, and its prompt; see the module's table. Tensors of members are `[N, …]`."""

    text: str
    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    trained: Tensor
    times: Tensor
    previous: Tensor | None = None
    x0: Tensor | None = None


@dataclass(frozen=True)
class SamplePayload:
    """Finished rollouts of members of one group, all or some, `[N, …]`, and its prompt; see the module's table."""

    text: str
    sample: Tensor
    times: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class DataPayload:
    """Rows of one anchor batch, all or some, with their captions; see the module's table. Tensors are `[R, …]`."""

    texts: tuple[str, ...]
    x0: Tensor


_DIMS = {
    GroupPayload: {"states": 5, "log_prob": 2, "trained": 1, "times": 1},
    SamplePayload: {"sample": 4, "times": 1},
    DataPayload: {"x0": 4},
}
_OPTIONAL = {GroupPayload: {"previous": 5, "x0": 3}, SamplePayload: {"x0": 3}, DataPayload: {}}
# Tensors of a member or row; the widest values first, so that each is aligned.
_ROWS = {GroupPayload: ("log_prob", "states", "previous"), SamplePayload: ("sample",), DataPayload: ("x0",)}
_TYPES = {"trained": torch.int64, "log_prob": torch.float64}  # all others are float32
_STATES = {"states", "previous"}  # or bfloat16
_LATENTS = {"states", "previous", "sample", "x0"}  # one dimension more for video
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}


def encode(payload: GroupMembers | SampleMembers | GroupPayload | DataPayload, states: torch.dtype = torch.float32) -> Segments:
    """The segments of a payload: its head, then its members (or rows).

    Args:
        states: type that states are stored in, float32 or bfloat16.
    Raises:
        PayloadError: members that do not belong together, or states that are no values of the type they are stored in.
    """
    if isinstance(payload, DataPayload):
        x0 = payload.x0
        if len(payload.texts) != len(x0):
            raise PayloadError(f"a data batch has {len(x0)} rows and {len(payload.texts)} captions")
        return _segments({}, list(payload.texts), len(x0), [("x0", _stored_type(x0, torch.float32), list(x0.shape[1:]))], {}, lambda i: iter([x0[i]]))
    if isinstance(payload, SampleMembers):
        return _samples(payload)
    group = _members_of(payload) if isinstance(payload, GroupPayload) else payload
    rows, places = _table(group.members, states)
    chosen = sorted({*places["x"], *places["x_next"]})
    found = {place: ("x", k) for k, place in enumerate(places["x"])} | {place: ("x_next", k) for k, place in enumerate(places["x_next"])}

    def tensors(i: int) -> Iterator[Tensor]:
        member = group.members[i]
        yield member.log_prob
        yield from (getattr(member, name)[k] for name, k in (found[place] for place in chosen))
        if member.previous is not None:
            yield member.previous

    shared = {"trained": group.trained, "times": group.times} | ({} if group.x0 is None else {"x0": group.x0})
    return _segments(shared, [group.text], len(group.members), rows, places, tensors)


def _samples(group: SampleMembers) -> Segments:
    kinds = {(sample.dtype, tuple(sample.shape)) for sample in group.samples}
    if len(kinds) != 1 or torch.float32 not in dict(kinds):
        raise PayloadError(f"samples of a group must be float32 of one shape, found {sorted(map(str, kinds))}")
    shared = {"times": group.times} | ({} if group.x0 is None else {"x0": group.x0})
    rows: list[_Row] = [("sample", torch.float32, list(group.samples[0].shape))]
    return _segments(shared, [group.text], len(group.samples), rows, {}, lambda i: iter([group.samples[i]]))


_Row = tuple[str, torch.dtype, list[int]]
"""Name, type and shape of a tensor of a member."""


def _segments(
    shared: dict[str, Tensor], texts: list[str], count: int, rows: list[_Row], places: dict[str, list[int]], tensors: Callable[[int], Iterator[Tensor]]
) -> Segments:
    """`tensors`: those of a member that make up its `rows`, one behind the other, each of one type."""
    table = {"count": count, "texts": texts, "rows": [[name, _NAMES[dtype], shape] for name, dtype, shape in rows], **places}
    head = {name: value.contiguous() for name, value in shared.items()}
    head |= {"format": torch.tensor([FORMAT]), "table": torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)}
    values = {name: math.prod(shape) for name, _, shape in rows}
    size = sum(dtype.itemsize * values[name] for name, dtype, _ in rows)

    def make(i: int) -> bytearray:
        data, offset, given = bytearray(size), 0, tensors(i)
        for name, dtype, _ in rows:
            left = values[name]
            while left:
                tensor = next(given)
                torch.frombuffer(data, dtype=dtype, count=tensor.numel(), offset=offset).view(tensor.shape).copy_(tensor.detach())
                left, offset = left - tensor.numel(), offset + dtype.itemsize * tensor.numel()
        return data

    return Segments(bytearray(save(head)), count, make)


def _members_of(group: GroupPayload) -> GroupMembers:
    counts = {name: len(value) for name in ("log_prob", "x", "x_next", "previous") if (value := getattr(group, name)) is not None}
    if len(set(counts.values())) > 1:
        raise PayloadError(f"GroupPayload has members of unequal number {counts}")
    previous: Sequence[Tensor | None] = [None] * len(group.x) if group.previous is None else list(group.previous)
    members = [MemberRow(*each) for each in zip(group.x, group.x_next, group.log_prob, previous, strict=True)]
    return GroupMembers(group.text, members, group.trained, group.times, group.x0)


def _table(members: Sequence[Member], states: torch.dtype) -> tuple[list[_Row], dict[str, list[int]]]:
    """The tensors of every member, and the places among its states of `x` and `x_next`: a state that is one before and after a step, in
    all members, is stored once. Raises PayloadError."""
    kinds, same = list[Any](), list[bool]()
    for member in members:
        x, x_next, previous = member.x, member.x_next, member.previous
        if x.shape != x_next.shape or x.dtype != x_next.dtype or x.dim() < 2 or len(x) == 0:
            raise PayloadError(f"states before and after the trained steps are {x.dtype} {tuple(x.shape)} and {x_next.dtype} {tuple(x_next.shape)}")
        tensors = [("log_prob", member.log_prob, member.log_prob.dtype), ("states", x, _stored_type(x, states))]
        tensors += [] if previous is None else [("previous", previous, _stored_type(previous, states))]
        kinds.append([(name, dtype, list(value.shape)) for name, value, dtype in tensors])
        if kinds[-1] != kinds[0] or not {dtype for _, dtype, _ in kinds[-1]} <= set(_NAMES):
            raise PayloadError(f"members of a group differ, or have types that are not stored: {kinds[0]} and {kinds[-1]}")
        same = same or [k > 0 for k in range(len(x))]
        same = [equal and torch.equal(x[k], x_next[k - 1]) for k, equal in enumerate(same)]
        for value in (x, x_next, previous):
            if value is not None and value.dtype == torch.float32 != states:
                _check(value, states)
    if not kinds:
        raise PayloadError("a group has no members")
    before, after, count = list[int](), list[int](), 0
    for shared in same:
        before.append(after[-1] if shared else count)
        count += not shared
        after.append(count)
        count += 1
    return [(name, dtype, [count, *shape[1:]] if name == "states" else shape) for name, dtype, shape in kinds[0]], {"x": before, "x_next": after}


def _stored_type(tensor: Tensor, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of states is stored in; what is no fp32 stays as it is."""
    return dtype if tensor.dtype == torch.float32 else tensor.dtype


def _check(states: Tensor, dtype: torch.dtype) -> None:
    """Raises PayloadError where storing `[K, …]` in `dtype` would change a value."""
    if not all(torch.equal(state.to(dtype).float(), state) for state in states):
        raise PayloadError(f"states are no values of {dtype}: rollouts must be sampled with the replay.store_dtype that they are stored in")


@dataclass(frozen=True)
class _Head:
    """What a head says: tensors that all share, how many members there are, the prompt or the rows' captions, (name, type, shape) of
    each tensor of a member, and the places among `states` of `x` and `x_next`."""

    shared: dict[str, Tensor]
    count: int
    texts: list[str]
    rows: list[tuple[str, torch.dtype, tuple[int, ...]]]
    places: dict[str, list[int]]

    def tensors(self, segments: Sequence[Buffer]) -> dict[str, Tensor]:
        """The tensors of these members, stacked, halved states as fp32. Raises PayloadError on a segment of another size."""
        size = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.rows)
        wrong = [len(segment) for segment in segments if len(segment) != size]
        if wrong:
            raise PayloadError(f"a member of a payload has {wrong[0]} bytes, its table says {size}")
        found, offset = {}, 0
        alone = len(segments) == 1 and not any(name in _STATES and dtype == torch.bfloat16 for name, dtype, _ in self.rows)
        for name, dtype, shape in self.rows:
            values = math.prod(shape)
            parts = [torch.frombuffer(s, dtype=dtype, count=values, offset=offset).reshape(shape) for s in segments if values]
            kept = torch.float32 if name in _STATES and dtype == torch.bfloat16 else dtype
            if alone and parts:
                found[name] = parts[0][None]  # where it lies, or a small tensor would hold the bytes of what was copied
            else:
                found[name] = torch.empty(len(segments), *shape, dtype=kept)
                for i, part in enumerate(parts):
                    found[name][i].copy_(part)
            offset += dtype.itemsize * values
        return found


def _open(data: Buffer) -> _Head:
    try:
        tensors = load(bytes(data))
    except Exception as error:  # safetensors raises its own class for every kind of damage
        raise PayloadError(f"payload is not safetensors: {error}") from None
    version, table = tensors.pop("format", None), tensors.pop("table", None)
    if version is None or version.tolist() != [FORMAT]:
        raise PayloadError(
            f"payload format {None if version is None else version.tolist()} is not {FORMAT}; it was written by another version of ddrl: "
            "finish the run with that one, or start a new run"
        )
    try:
        said = json.loads(bytes(table.tolist())) if table is not None else {}
        rows = [(str(name), _BY_NAME[dtype], tuple(int(n) for n in shape)) for name, dtype, shape in said["rows"]]
        places = {name: [int(place) for place in said[name]] for name in ("x", "x_next") if name in said}
        return _Head(tensors, int(said["count"]), [str(text) for text in said["texts"]], rows, places)
    except (KeyError, TypeError, ValueError) as error:
        raise PayloadError(f"the table of a payload cannot be read: {type(error).__name__}: {error}") from None


def _decode(kind: type, head: _Head, segments: Sequence[Buffer]) -> dict[str, Tensor]:
    stray = [name for name, _, _ in head.rows if name not in _ROWS[kind] or name in head.shared]
    found = {name: tensor.dim() for name, tensor in head.shared.items()} | {name: 1 + len(shape) for name, _, shape in head.rows}
    dims = _DIMS[kind] | {name: count for name, count in _OPTIONAL[kind].items() if name in found}
    if stray or found not in (dims, {name: count + (name in _LATENTS) for name, count in dims.items()}):
        raise PayloadError(f"{kind.__name__} needs tensors of dimensions {dims}, found {found}")
    given = {name: tensor.dtype for name, tensor in head.shared.items()} | {name: dtype for name, dtype, _ in head.rows}
    halves = {name for name, dtype in given.items() if name in _STATES and dtype == torch.bfloat16}
    types = {name: dtype for name, dtype in given.items() if dtype != _TYPES.get(name, torch.float32) and name not in halves}
    if types:
        raise PayloadError(f"{kind.__name__} has tensors that are not float32 (trained: int64, log_prob: float64): {types}")
    return head.shared | head.tensors(segments)


def count_of(head: Buffer) -> int:
    """How many members (rows) the payload of a head has. Raises PayloadError."""
    return _open(head).count


def decode_group(segments: Sequence[Buffer]) -> GroupPayload:
    """The head of a group and some of its members (all, in order, or none). Raises PayloadError."""
    head = _open(segments[0])
    if len(head.texts) != 1:
        raise PayloadError(f"a group has one prompt, its table names {len(head.texts)}")
    tensors: dict[str, Any] = _decode(GroupPayload, head, segments[1:])
    states = tensors.pop("states")
    for name in ("x", "x_next"):
        places = head.places.get(name, [])
        if not places or not all(0 <= place < states.shape[1] for place in places):
            raise PayloadError(f"the table of a payload puts {name} at {places} of {states.shape[1]} states")
        step = max(1, places[1] - places[0]) if len(places) > 1 else 1
        even = slice(places[0], places[-1] + 1, step)
        tensors[name] = states[:, even] if places == list(range(even.start, even.stop, step)) else states[:, places]  # a view, where it can be
    group = GroupPayload(text=head.texts[0], **tensors)
    latents = {group.x.shape, group.x_next.shape} | ({group.previous.shape} if group.previous is not None else set())
    strays = [group.log_prob.shape != group.x.shape[:2], len(group.trained) != group.x.shape[1], not _belongs(group.x0, group.x.shape[2:])]
    if len(latents) > 1 or any(strays):
        raise PayloadError("group payload has tensors of clashing shapes")
    return group


def decode_samples(segments: Sequence[Buffer]) -> SamplePayload:
    """The head of a group of samples and some of its members (all, in order, or none). Raises PayloadError."""
    head = _open(segments[0])
    if len(head.texts) != 1:
        raise PayloadError(f"a group has one prompt, its table names {len(head.texts)}")
    group = SamplePayload(text=head.texts[0], **_decode(SamplePayload, head, segments[1:]))
    if not _belongs(group.x0, group.sample.shape[1:]):
        raise PayloadError("a group's own datum is not of the size of its samples")
    return group


def _belongs(x0: Tensor | None, shape: Sequence[int]) -> bool:
    """Whether an example's own latent is of the size of states of this shape, but for frames in front that are given."""
    if x0 is None or x0.shape == shape:
        return True
    return len(shape) == 4 and x0.dim() == 4 and x0.shape[1] >= shape[1] and (x0.shape[0], *x0.shape[2:]) == (shape[0], *shape[2:])


def decode_data(segments: Sequence[Buffer], rows: Sequence[int]) -> DataPayload:
    """The head of a data batch and the segments of these of its rows. Raises PayloadError."""
    head = _open(segments[0])
    tensors: dict[str, Any] = _decode(DataPayload, head, segments[1:])
    if len(head.texts) != head.count or max(rows, default=0) >= head.count or len(rows) != len(segments) - 1:
        raise PayloadError(f"a data batch of {head.count} rows with {len(head.texts)} captions was read as {len(segments) - 1} of its rows: {list(rows)}")
    return DataPayload(texts=tuple(head.texts[row] for row in rows), **tensors)
