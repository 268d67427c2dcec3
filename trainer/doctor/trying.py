"""Gathering: whether a recipe can be tried here, and what its trial tells, from a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from trainer.config.render import render_config
from trainer.config.run import RunConfig
from trainer.doctor.facts import Trial
from trainer.doctor.finding import Finding

DEADLINE_S = 900.0
"""For loading the policy and the rewards and some updates; of a small policy it is about a minute."""


def gather_trial(config: RunConfig, gpus: int, against: Sequence[Finding], deadline_s: float = DEADLINE_S, command: Sequence[str] | None = None) -> Trial:
    """What the trial of `trainer.doctor.trial` tells. `gpus`: of this machine; `against`: problems that stand against one; `command`: what makes it."""
    why = against_it(config, gpus, against)
    if why:
        return Trial(skipped=why)
    asked = [*(command or (sys.executable, "-m", "trainer.doctor.trial"))]
    try:
        done = subprocess.run(asked, input=render_config(config), capture_output=True, text=True, timeout=deadline_s, check=False)
    except subprocess.TimeoutExpired:
        return Trial(stage="start", error=f"it was not done after {deadline_s:.0f} s")
    try:
        values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
        lists: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return Trial(**lists)
    except (IndexError, ValueError, TypeError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return Trial(stage="start", error=f"it ended with status {done.returncode}: {last[:300]}")


def against_it(config: RunConfig, gpus: int, against: Sequence[Finding]) -> str:
    """Why a trial makes no sense here; '' where it does."""
    if against:
        return f"{against[0].check} comes first"
    if not config.uses_policy:
        return "without rollouts there is nothing to try"
    if (config.learner.gpus or config.rollout.gpus) and not gpus:
        return "the recipe asks for GPUs, and this machine has none; --tiny tries it small"
    return ""
