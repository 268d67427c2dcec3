"""A group of clips in its real sizes, written or read in a process of its own: `python -m tests.integration.actors.real_sizes WHAT URL CHAINED`.

Sizes are those of 93 frames of 704 x 1280: a latent of 16 x 24 x 88 x 160, 21.6 MB in fp32; eight members, ten trained steps of a two-step
kernel, states stored in bfloat16. Values are random bits that are finite numbers, each state a function of its name. What is printed, as
JSON: `peak`, the most resident bytes beyond what the imports take.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor

from actors.members import GroupMembers, MemberRow
from actors.payload import decode_group, encode
from diffusion.seeds import key
from replay.buffer import ReplayBuffer
from replay.connect import connect

LATENT, MEMBERS, STEPS, RUN, TEXT = (16, 24, 88, 160), 8, 10, "real-sizes", "a harbour at dawn, boats leaving"
LATENT_BYTES = 2 * 16 * 24 * 88 * 160
"""Of one state as it is stored."""


def states(chained: bool) -> int:
    """Tensors of a latent's size that are stored of a member: states, and the predictions before the steps."""
    return (STEPS + 1 if chained else 2 * STEPS) + STEPS


def state(name: str, member: int, k: int) -> Tensor:
    """bf16 `LATENT`: random bits without the highest of the exponent, so that all are finite."""
    bits = np.random.default_rng(key(name, member, k)).integers(0, 1 << 16, LATENT, np.uint16) & 0xBFFF
    return torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)


def place(name: str, member: int, k: int, chained: bool) -> Tensor:
    """`x` or `x_next` of trained step k; chained steps share a state."""
    return state("x", member, k + (name == "x_next")) if chained else state(name, member, k)


def filled(name: str, member: int, chained: bool) -> Tensor:
    """A member's tensor `[STEPS, *LATENT]`, filled in state by state."""
    whole = torch.empty(STEPS, *LATENT, dtype=torch.bfloat16)
    for k in range(STEPS):
        whole[k] = state(name, member, k) if name == "previous" else place(name, member, k, chained)
    return whole


class Members(Sequence[MemberRow]):
    """The members of the group, made as they are asked for."""

    def __init__(self, chained: bool) -> None:
        self.chained = chained

    def __len__(self) -> int:
        return MEMBERS

    @overload
    def __getitem__(self, index: int) -> MemberRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[MemberRow]: ...
    def __getitem__(self, index: int | slice) -> MemberRow | list[MemberRow]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(MEMBERS))]
        if not 0 <= index < MEMBERS:
            raise IndexError(index)
        log_prob = torch.full((STEPS,), float(index), dtype=torch.float64)
        x, x_next, previous = (filled(name, index, self.chained) for name in ("x", "x_next", "previous"))
        return MemberRow(x, x_next, log_prob, previous)


def write(buffer: ReplayBuffer, chained: bool) -> None:
    lease = buffer.lease("writer", 10)
    assert lease is not None
    group = GroupMembers(TEXT, Members(chained), torch.arange(STEPS), torch.linspace(1, 0, 21))
    assert buffer.commit(lease, encode(group, torch.bfloat16), [m / 10 for m in range(MEMBERS)], 0)


def read(buffer: ReplayBuffer, chained: bool) -> None:
    """As eight ranks do, each its member."""
    (group,) = buffer.claim(1, buffer.rollback(0), 10).groups
    for member in range(MEMBERS):
        found = decode_group(buffer.read(group, [0, 1 + member]))
        assert (found.text, found.x.shape, found.x.dtype) == (TEXT, (1, STEPS, *LATENT), torch.float32)
        assert found.previous is not None
        assert found.log_prob.unique().tolist() == [float(member)]
        for k in range(STEPS):
            for name in ("x", "x_next"):
                assert torch.equal(getattr(found, name)[0, k], place(name, member, k, chained).float()), (name, member, k)
            assert torch.equal(found.previous[0, k], state("previous", member, k).float()), (member, k)
        del found


def status(line: str) -> int:
    """Bytes of a line of /proc/self/status: of this process since it was started, whoever started it."""
    return next(int(text.split()[1]) << 10 for text in Path("/proc/self/status").read_text().splitlines() if text.startswith(line))


if __name__ == "__main__":
    what, url, chained = sys.argv[1], sys.argv[2], sys.argv[3] == "chained"
    buffer = ReplayBuffer.attach(connect(url), RUN)
    _ = torch.zeros(8).bfloat16().float() + torch.from_numpy(np.random.default_rng(0).integers(0, 9, 8))  # what first calls bring in
    start = status("VmRSS")
    {"write": write, "read": read}[what](buffer, chained)
    print(json.dumps({"peak": status("VmHWM") - start}))
