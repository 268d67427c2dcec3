"""What is sampled: the requests of workloads/rollout.json, and how rivals that batch by shape must cut them up. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).parents[1] / "workloads" / "rollout.json"
PATCH = 4
"""Patch edge of recipes/glyph-base in pixels."""


@dataclass(frozen=True)
class Job:
    """One request: `n` samples of a prompt.

    Attributes:
        height, width: pixels.
        steps: denoising steps.
        tokens: packed tokens of one sample (image and text).
        group: its position in the workload; names its noise.
    """

    height: int
    width: int
    steps: int
    n: int
    prompt: str
    tokens: int
    group: int

    @property
    def kind(self) -> tuple[int, int, int]:
        """What the samples of one pipeline call must have in common."""
        return self.height, self.width, self.steps

    @property
    def work(self) -> int:
        """Packed tokens times steps, of all its samples."""
        return self.n * self.tokens * self.steps


@dataclass(frozen=True)
class Batch:
    """Samples that a rival runs together from the first step to the last: `(position of the job, samples)` of one kind."""

    kind: tuple[int, int, int]
    parts: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> int:
        return sum(n for _, n in self.parts)


@cache
def spec() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(FILE.read_text())
    return found


def about(name: str) -> str:
    return str(spec()["workloads"][name]["about"])


def names() -> list[str]:
    """Workloads whose requests are all there from the start."""
    return [name for name in spec()["workloads"] if name != "streaming"]


def jobs(name: str, text_tokens: int, quick: bool = False) -> list[Job]:
    """Requests of a workload; with `quick`, a few of them with a quarter of their steps."""
    rows = spec()["workloads"][name]["requests"]
    found = [
        Job(height, width, steps, n, f'a sign that says "{text}"', height * width // PATCH**2 + text_tokens, group)
        for group, (height, width, steps, n, text) in enumerate(rows)
    ]
    return [replace(job, steps=max(2, job.steps // 4)) for job in found[: 2 if name.startswith(("uniform", "mixed_")) else 8]] if quick else found


def arrivals(count: int, rate: float) -> list[float]:
    """Times of the first `count` arrivals of the committed Poisson process at `rate` a second; the first is at 0."""
    times, now = [], 0.0
    for gap in spec()["gaps"][:count]:
        times.append(now)
        now += gap / rate
    return times


def batches(work: Sequence[Job], max_tokens: int) -> list[Batch]:
    """The fewest pipeline calls that do the work: samples of one kind together, across prompts, as many as the budget holds."""
    by_kind: dict[tuple[int, int, int], list[int]] = {}
    for position, job in enumerate(work):
        by_kind.setdefault(job.kind, []).append(position)
    found = []
    for kind, positions in by_kind.items():
        room = max(1, max_tokens // work[positions[0]].tokens)
        samples = [position for position in positions for _ in range(work[position].n)]
        for start in range(0, len(samples), room):
            chunk = samples[start : start + room]
            found.append(Batch(kind, tuple((p, chunk.count(p)) for p in dict.fromkeys(chunk))))
    return found


def tokens_per_forward(work: Sequence[Job], together: Sequence[Batch]) -> float:
    """Mean packed tokens of a forward pass when every batch runs from its first step to its last."""
    forwards = sum(batch.kind[2] for batch in together)
    return sum(job.work for job in work) / forwards
