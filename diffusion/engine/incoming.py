"""Weights on their way into a model: shapes that can be checked at once, tensors that come one piece at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from torch import Tensor

Piece = tuple[str, tuple[slice, ...], Tensor]
"""Name of a tensor, the place of a piece in it, the piece."""


class Incoming(Protocol):
    """Weights that are held somewhere else (a file, shared memory) until they are put in place.

    Whoever makes one has checked the bytes: `pieces` is asked for between two forward passes, and nothing may fail there.
    """

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """Every tensor, whole or cut; a piece is good until the next one is asked for."""
        ...


class Whole:
    """A state dict as incoming weights."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._state = state

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def pieces(self) -> Iterator[Piece]:
        for name, tensor in self._state.items():
            yield name, (), tensor
