"""A group as its members and a payload as its segments, each looked at by itself: a group of clips is gigabytes and need never lie in one piece.

Invariant: whatever is asked for again is the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, overload

from torch import Tensor


class Member(Protocol):
    """What is stored of one member of a group, K trained steps; a `Trajectory` is one."""

    @property
    def x(self) -> Tensor: ...
    @property
    def x_next(self) -> Tensor: ...
    @property
    def log_prob(self) -> Tensor: ...
    @property
    def previous(self) -> Tensor | None: ...


@dataclass(frozen=True)
class GroupMembers:
    """A group that is to be stored. Its members are looked at one after another, several times, and may be made as they are asked for."""

    text: str
    members: Sequence[Member]
    trained: Tensor
    times: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class SampleMembers:
    """A group of which the samples alone are stored, `[*shape]` each: for losses that noise them anew."""

    text: str
    samples: Sequence[Tensor]
    times: Tensor
    x0: Tensor | None = None


@dataclass(frozen=True)
class MemberRow:
    """Member of a group that lies in one piece."""

    x: Tensor
    x_next: Tensor
    log_prob: Tensor
    previous: Tensor | None


class Segments(Sequence[bytearray]):
    """The head, then `count` members (or rows), each made anew when it is asked for, with equal bytes."""

    def __init__(self, head: bytearray, count: int, make: Callable[[int], bytearray]) -> None:
        self._head, self._count, self._make = head, count, make

    def __len__(self) -> int:
        return 1 + self._count

    @overload
    def __getitem__(self, index: int) -> bytearray: ...
    @overload
    def __getitem__(self, index: slice) -> list[bytearray]: ...
    def __getitem__(self, index: int | slice) -> bytearray | list[bytearray]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        return self._make(number - 1) if number else self._head
