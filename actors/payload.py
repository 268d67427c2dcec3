"""The wire format of groups and data batches: a head, then one segment for each member (or row), whose bytes are its tensors.

This is the only encoder and decoder. Segments are what `replay.buffer` reads apart, so a rank fetches the members it trains.
The head is safetensors: what all members share, `format`, and `table`, JSON as bytes: how many members (rows) there are, and
name, type, shape of each tensor of a member; in a segment they follow each other in that order without a gap. It also has the text of
the group or of every row: what the network is conditioned on is made of it by the text encoder, where it is needed, and stored
nowhere. Of a group it names the places among `states` of `x` and of `x_next`: where one trained step follows another, they share a
state.

With `states=torch.bfloat16` states and `previous` are stored in half the bytes. Rollouts must have been sampled through such
values (`replay.store_dtype`): bytes that would change a state, and so its density, are refused.

Members N, trained steps K, latent shape C h w (or C f h w).

    group   head    trained           i64 [K]              trained step indices
                    times             f32 [steps + 1]      time grid that was sampled on
                    x0                f32 [C, h, w]        clean latent of the group's own example; only with data.pairing: own. Of clips
                                                           it has the frames that are given too, which states have not
            member  log_prob          f64 [K]              exact log-density (mean over entries) under the sampling weights
                    states            f32 [S, C, h, w]     states before and after each trained step (x, x_next), each once
                    previous          f32 [K, C, h, w]     prediction of x0 in the step before; only for kernels that use it
    data    row     x0                f32 [C, h, w]        clean latent
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

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
class DataPayload:
    """Rows of one anchor batch, all or some, with their captions; see the module's table. Tensors are `[R, …]`."""

    texts: tuple[str, ...]
    x0: Tensor


_DIMS = {
    GroupPayload: {"states": 5, "log_prob": 2, "trained": 1, "times": 1},
    DataPayload: {"x0": 4},
}
_OPTIONAL = {GroupPayload: {"previous": 5, "x0": 3}, DataPayload: {}}
# Tensors of a member or row; the widest values first, so that each is aligned.
_ROWS = {GroupPayload: ("log_prob", "states", "previous"), DataPayload: ("x0",)}
_TYPES = {"trained": torch.int64, "log_prob": torch.float64}  # all others are float32
_STATES = {"states", "previous"}  # or bfloat16
_LATENTS = {"states", "previous", "x0"}  # one dimension more for video
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.bfloat16: "bfloat16"}
_BY_NAME = {name: dtype for dtype, name in _NAMES.items()}


def encode(payload: GroupPayload | DataPayload, states: torch.dtype = torch.float32) -> list[bytearray]:
    """The segments of a payload: its head, then its members (or rows).

    Args:
        states: type that states are stored in, float32 or bfloat16.
    Raises:
        PayloadError: members that do not belong together, or states that are no values of the type they are stored in.
    """
    shared = {f.name: value for f in fields(payload) if isinstance(value := getattr(payload, f.name), Tensor)}
    texts = [payload.text] if isinstance(payload, GroupPayload) else list(payload.texts)
    rows: dict[str, tuple[list[int], list[Tensor]]] = {}  # shape in a member, and tensors [N, …] of which a member has a slice each
    places: dict[str, list[int]] = {}
    for name in _ROWS[type(payload)]:
        if name == "states":
            pieces, places = _once(shared.pop("x"), shared.pop("x_next"))
            rows[name] = [len(pieces), *pieces[0].shape[1:]], [_stored(piece, states) for piece in pieces]
        elif name in shared:
            value = shared.pop(name)
            rows[name] = list(value.shape[1:]), [_stored(value, states) if name == "previous" else value]
    counts = {name: len(pieces[0]) for name, (_, pieces) in rows.items()}
    types = {name: pieces[0].dtype for name, (_, pieces) in rows.items()}
    if len(set(counts.values())) > 1 or not set(types.values()) <= set(_NAMES):
        raise PayloadError(f"{type(payload).__name__} has members of unequal number {counts}, or types that are not stored {types}")
    count = next(iter(counts.values()))
    if isinstance(payload, DataPayload) and len(texts) != count:
        raise PayloadError(f"a data batch has {count} rows and {len(texts)} captions")
    table = {"count": count, "texts": texts, "rows": [[name, _NAMES[types[name]], shape] for name, (shape, _) in rows.items()], **places}
    head = {name: value.contiguous() for name, value in shared.items()}
    head |= {"format": torch.tensor([FORMAT]), "table": torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)}
    return [bytearray(save(head)), *(bytearray().join(_bytes(p[i]) for _, pieces in rows.values() for p in pieces) for i in range(count))]


def _once(x: Tensor, x_next: Tensor) -> tuple[list[Tensor], dict[str, list[int]]]:
    """The states `[N, …]` before and after each trained step, each once, and the places of `x` and `x_next` among them."""
    if x.shape != x_next.shape or x.dtype != x_next.dtype or x.dim() < 3 or x.shape[1] == 0:
        raise PayloadError(f"states before and after the trained steps are {x.dtype} {tuple(x.shape)} and {x_next.dtype} {tuple(x_next.shape)}")
    found: list[Tensor] = []
    before, after = list[int](), list[int]()
    for k in range(x.shape[1]):
        if k and torch.equal(x[:, k], x_next[:, k - 1]):
            before.append(after[-1])
        else:
            before.append(len(found))
            found.append(x[:, k])
        after.append(len(found))
        found.append(x_next[:, k])
    return found, {"x": before, "x_next": after}


def _stored(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In the type it is stored in, without any change of a value."""
    if dtype == torch.float32 or tensor.dtype != torch.float32:
        return tensor
    half = tensor.to(dtype)
    if not torch.equal(half.float(), tensor):
        raise PayloadError(f"states are no values of {dtype}: rollouts must be sampled with the replay.store_dtype that they are stored in")
    return half


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy().data


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
        """The tensors of these members, stacked. Raises PayloadError on a segment of another size."""
        size = sum(dtype.itemsize * math.prod(shape) for _, dtype, shape in self.rows)
        wrong = [len(segment) for segment in segments if len(segment) != size]
        if wrong:
            raise PayloadError(f"a member of a payload has {wrong[0]} bytes, its table says {size}")
        found, offset = {}, 0
        for name, dtype, shape in self.rows:
            values = math.prod(shape)
            parts = [torch.frombuffer(s, dtype=dtype, count=values, offset=offset).reshape(shape) for s in segments if values]
            found[name] = torch.stack(parts) if parts else torch.empty(len(segments), *shape, dtype=dtype)
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
    return head.shared | {name: tensor.float() if name in halves else tensor for name, tensor in head.tensors(segments).items()}


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
        first, last = places[0], places[-1]
        tensors[name] = states[:, first : last + 1] if places == list(range(first, last + 1)) else states[:, places]
    group = GroupPayload(text=head.texts[0], **tensors)
    latents = {group.x.shape, group.x_next.shape} | ({group.previous.shape} if group.previous is not None else set())
    strays = [group.log_prob.shape != group.x.shape[:2], len(group.trained) != group.x.shape[1], not _belongs(group.x0, group.x.shape[2:])]
    if len(latents) > 1 or any(strays):
        raise PayloadError("group payload has tensors of clashing shapes")
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
