"""Counters of an engine: what it has done since it was made."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class EngineStats:
    """What an engine has done since it was made.

    Attributes:
        forwards: packed forward passes.
        tokens: packed tokens in them (a guided sequence counts twice).
        sequence_steps: denoising steps taken, a shared one once.
        saved_steps: denoising steps that members did not take because the steps before their branch were shared.
        occupancy: mean share of the token budget that a forward pass used.
        seconds: time spent in `step`.
        finished, failed, aborted: samples.
        out_of_memory: forward passes that did not fit and were tried again with less.
        budget: token budget now.
    """

    forwards: int = 0
    tokens: int = 0
    sequence_steps: int = 0
    saved_steps: int = 0
    occupancy: float = 0.0
    seconds: float = 0.0
    finished: int = 0
    failed: int = 0
    aborted: int = 0
    out_of_memory: int = 0
    budget: int = 0

    def after_forward(self, tokens: int, members: list[int], budget: int) -> EngineStats:
        """One forward pass more, of `tokens` tokens; `members` are those each sequence stepped for."""
        return replace(
            self,
            forwards=self.forwards + 1,
            tokens=self.tokens + tokens,
            sequence_steps=self.sequence_steps + len(members),
            saved_steps=self.saved_steps + sum(members) - len(members),
            occupancy=(self.occupancy * self.forwards + tokens / budget) / (self.forwards + 1),
        )

    def after_step(self, seconds: float, finished: int, failed: int) -> EngineStats:
        """One step more, with the samples that ended in it."""
        return replace(self, seconds=self.seconds + seconds, finished=self.finished + finished, failed=self.failed + failed)

    def after_abort(self, samples: int) -> EngineStats:
        return replace(self, aborted=self.aborted + samples)

    def after_shortage(self) -> EngineStats:
        return replace(self, out_of_memory=self.out_of_memory + 1)
