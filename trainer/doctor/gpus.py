"""The GPUs of a machine as the plan knows GPUs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from trainer.doctor import facts
from trainer.plan import gpus as planned

UNKNOWN = "a100-40"
"""Whose rates stand in for a kind that the table does not have: they change times alone, not whether a run fits."""


def as_planned(found: Sequence[facts.GPU]) -> planned.GPU:
    """The kind to plan with: the smallest of a machine's GPUs, with its own memory and the rates of its entry in the plan's table."""
    if not found:
        return planned.GPUS[UNKNOWN]
    least = min(found, key=lambda gpu: gpu.memory)
    known = [name for name in planned.GPUS if name.partition("-")[0] in least.name.lower().replace(" ", "")]
    return replace(planned.GPUS[known[0] if known else UNKNOWN], name=least.name, memory=float(least.memory))
