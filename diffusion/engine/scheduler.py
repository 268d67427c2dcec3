"""Which sequences take the next denoising step. Pure: no tensors, no clock.

Lifecycle of a sequence: waiting → running → finished; sequences join and leave between steps. A *tick* is one call of
`schedule`, one packed forward pass.

Invariants, each held by a property test:

1. The tokens of a tick never exceed the budget, unless one sequence alone does; then it runs alone.
2. A running sequence takes part in every tick, as long as the budget is not lowered. After it was, running sequences
   take turns, the one that has waited longest first, so each takes part at least once in as many ticks as there are
   running sequences.
3. Order is that of arrival, and one level of priority is a head start of `patience` ticks. Nothing starves: what
   arrives `patience` ticks later per level of difference stands behind.
4. A sequence that does not fit may be overtaken by smaller ones for `patience` ticks; then the gate closes and room is
   kept until it fits, at the latest when what runs has finished.

Worked example, budget 10, patience 2: `a` (6 tokens) runs; `b` (6) waits; `c` (4) came last and fills the gap beside
`a` at once. `d` (4) arrives when `c` leaves, two ticks later: the gate is closed for `b`, so `d` waits although it would
fit; when `a` leaves, `b` and `d` start together.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(order=True)
class _Entry(Generic[T]):
    """A sequence in the scheduler; entries sort in the order in which they should start."""

    start_key: int
    arrival: int
    item: T = field(compare=False)
    tokens: int = field(compare=False)
    entered: int = field(compare=False)
    family: Hashable = field(compare=False)
    last_tick: int = field(compare=False, default=0)


class Scheduler(Generic[T]):
    """Continuous batching under a token budget.

    Args:
        max_tokens: tokens of one packed forward pass.
        patience: ticks that a level of priority is worth, and for which a sequence that does not fit may be overtaken.

    Attributes:
        hold: while true nothing new is admitted; families of which some sequence has begun go on to their end.
    """

    def __init__(self, max_tokens: int, patience: int = 32) -> None:
        if max_tokens < 1 or patience < 1:
            raise ValueError(f"max_tokens and patience must be at least 1, got {max_tokens} and {patience}")
        self.max_tokens, self.patience, self.hold = max_tokens, patience, False
        self._waiting: list[_Entry[T]] = []
        self._running: list[_Entry[T]] = []
        self._begun: set[Hashable] = set()
        self._tick = 0
        self._arrivals = 0

    def add(self, item: T, tokens: int, priority: int = 0, family: Hashable = None, like: T | None = None) -> None:
        """Queue a sequence.

        Args:
            family: what belongs together under `hold`; None = it stands alone.
            like: a running sequence that this one continues: it takes its family and the place that it had in the order.
        """
        parent = next((e for e in self._running if like is not None and e.item is like), None)
        entered = self._tick if parent is None else parent.entered
        key = entered - priority * self.patience if parent is None else parent.start_key
        arrival = self._arrivals if parent is None else parent.arrival
        own = ("alone", self._arrivals) if family is None else family
        self._arrivals += 1
        insort(self._waiting, _Entry(key, arrival, item, tokens, entered, own if parent is None else parent.family))

    def schedule(self) -> list[T]:
        """The sequences of this tick: running ones, and those waiting that fit beside them."""
        self._tick += 1
        chosen, room = self._continue()
        if len(chosen) == len(self._running):
            chosen += self._admit(room, alone=not chosen)
        for entry in chosen:
            entry.last_tick = self._tick
        return [entry.item for entry in chosen]

    def _continue(self) -> tuple[list[_Entry[T]], int]:
        """Running sequences of this tick, and the room left beside them."""
        room = self.max_tokens
        chosen: list[_Entry[T]] = []
        for entry in sorted(self._running, key=lambda e: e.last_tick):  # stable: admission order while all take part
            if entry.tokens <= room or not chosen:
                chosen.append(entry)
                room -= entry.tokens
        return chosen, room

    def _admit(self, room: int, alone: bool) -> list[_Entry[T]]:
        """Move what fits from waiting to running. `alone`: nothing runs, so the first may exceed the budget."""
        admitted: list[_Entry[T]] = []
        for entry in self._waiting:
            if self.hold and entry.family not in self._begun:
                continue
            if entry.tokens <= room or (alone and not admitted):
                admitted.append(entry)
                room -= entry.tokens
            elif self._tick - entry.entered > self.patience:
                break  # the gate: nobody overtakes it any more
            if room <= 0:
                break
        if admitted:
            taken = set(map(id, admitted))
            self._waiting = [e for e in self._waiting if id(e) not in taken]
            self._running += admitted
            self._begun |= {e.family for e in admitted}
        return admitted

    def finish(self, items: list[T]) -> None:
        """Drop running sequences, by identity."""
        done = set(map(id, items))
        self._running = [e for e in self._running if id(e.item) not in done]
        self._forget_ended()

    def remove(self, which: Callable[[T], bool]) -> list[T]:
        """Drop every sequence, waiting or running, that `which` says; returns them."""
        gone = [e.item for e in (*self._waiting, *self._running) if which(e.item)]
        self._waiting = [e for e in self._waiting if not which(e.item)]
        self._running = [e for e in self._running if not which(e.item)]
        self._forget_ended()
        return gone

    def _forget_ended(self) -> None:
        self._begun &= {e.family for e in (*self._waiting, *self._running)}

    def lower_budget(self, tokens: int) -> None:
        """Set a smaller budget, at least one token; what runs then takes turns."""
        self.max_tokens = max(1, min(self.max_tokens, tokens))

    @property
    def started(self) -> bool:
        """Whether anything runs, or belongs to a family that has begun."""
        return bool(self._begun)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)
