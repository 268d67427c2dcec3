"""Which requests take the next denoising step. Pure: no tensors, no clock.

Lifecycle of a request: waiting → running → finished. Requests join and leave between steps. Invariant: the tokens of
all running requests never exceed the budget, and requests start in the order they came.
"""

from __future__ import annotations

from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class Scheduler(Generic[T]):
    """First come, first served, under a token budget.

    Args:
        max_tokens: tokens of one packed forward pass.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self._waiting: deque[tuple[T, int]] = deque()
        self._running: list[tuple[T, int]] = []

    def add(self, request: T, tokens: int) -> None:
        """Queue a request. Raises ValueError when it alone exceeds the budget."""
        if tokens > self.max_tokens:
            raise ValueError(f"one request needs {tokens} tokens, more than the budget of {self.max_tokens}; raise sampler.max_tokens")
        self._waiting.append((request, tokens))

    def schedule(self) -> list[T]:
        """Admit what fits and return everything that runs now."""
        used = sum(tokens for _, tokens in self._running)
        while self._waiting and used + self._waiting[0][1] <= self.max_tokens:
            item = self._waiting.popleft()
            used += item[1]
            self._running.append(item)
        return [request for request, _ in self._running]

    def finish(self, done: set[int]) -> None:
        """Drop running requests by object identity (`id`)."""
        self._running = [item for item in self._running if id(item[0]) not in done]

    def __len__(self) -> int:
        return len(self._waiting) + len(self._running)
