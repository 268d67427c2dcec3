"""Memory for decoded pixels, shared by all requests of a process: who finds it taken waits its turn.

Lifecycle: ``hold(pixels)`` waits until that much is free → the holder decodes, may ``shrink`` to what it really needed →
leaves the block. Invariants: the sum of all holds never exceeds the budget; first come, first served, so a large request
is not overtaken for ever; a wait ends with the caller's deadline, by cancellation.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Held:
    """A share of the budget."""

    def __init__(self, budget: PixelBudget, pixels: int) -> None:
        self._budget, self.pixels = budget, pixels

    def shrink(self, pixels: int) -> None:
        """Give back what is not needed."""
        if pixels < self.pixels:
            self._budget._give(self.pixels - pixels)
            self.pixels = pixels


class PixelBudget:
    """``total`` pixels; belongs to one event loop."""

    def __init__(self, total: int) -> None:
        self._free = self._total = total
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """Pixels nobody holds."""
        return self._free

    @asynccontextmanager
    async def hold(self, pixels: int) -> AsyncIterator[Held]:
        """A share of ``pixels``, or of everything when that is less. Waits."""
        share = min(pixels, self._total)
        if self._waiting or share > self._free:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            entry = (share, turn)
            self._waiting.append(entry)
            try:
                await turn
            except BaseException:
                if turn.done() and not turn.cancelled():
                    self._give(share)  # it came at the moment the waiting was given up
                else:
                    self._waiting.remove(entry)
                    self._next()
                raise
        else:
            self._free -= share
        held = Held(self, share)
        try:
            yield held
        finally:
            self._give(held.pixels)

    def _give(self, pixels: int) -> None:
        self._free += pixels
        self._next()

    def _next(self) -> None:
        while self._waiting and (self._waiting[0][1].done() or self._waiting[0][0] <= self._free):
            share, turn = self._waiting[0]
            if turn.done():  # cancelled; its owner takes it out
                return
            self._waiting.popleft()
            self._free -= share
            turn.set_result(None)
