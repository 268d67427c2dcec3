"""The doctor's round: gather, then judge."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.doctor import judge_machine, judge_recipe, judge_software, judge_trial
from trainer.doctor.facts import GPU, Machine, Recipe, Software
from trainer.doctor.finding import Finding
from trainer.doctor.machine import gather_machine
from trainer.doctor.software import gather_software

AGAINST = ("recipe", "recipe files", "plan", "torch", "packages")
"""Checks whose problems stand against a trial."""


def examine(recipe: Path | None, config: RunConfig | ConfigError | None, online: bool, tried: bool = False) -> list[Finding]:
    """Look at this machine, and at `recipe` as it was read: its settings, or why it could not be; None for no recipe. `tried`: make the trial of
    `trainer.doctor.trial` too, where nothing that was found before stands against it."""
    runs = Path("runs") / config.name if isinstance(config, RunConfig) else Path("runs")
    software, machine = gather_software(), gather_machine(runs, online)
    told = judged(software, machine, _recipe(recipe, config, software.torch.gpus, online))
    if tried and isinstance(config, RunConfig):
        from trainer.doctor.trying import gather_trial

        told += judge_trial.judge(gather_trial(config, len(software.torch.gpus), [f for f in told if f.level == "problem" and f.check in AGAINST]))
    return told


def _recipe(recipe: Path | None, config: RunConfig | ConfigError | None, gpus: Sequence[GPU], online: bool) -> Recipe | None:
    if recipe is None or config is None:
        return None
    if isinstance(config, ConfigError):
        return Recipe(str(recipe), error=str(config))
    from trainer.doctor.needs import gather_recipe

    return gather_recipe(recipe, config, gpus, online)


def judged(software: Software, machine: Machine, recipe: Recipe | None = None) -> list[Finding]:
    """Everything that is said of these facts, in the order in which it is shown. Pure."""
    if recipe is None or recipe.error:
        about = judge_machine.judge(machine)
    else:
        hosts, stored = (recipe.plan.hosts, recipe.plan.disk) if recipe.plan else (0.0, 0.0)
        about = judge_machine.judge(machine, recipe.object_store, hosts, stored)
    return [*judge_software.judge(software), *about, *(judge_recipe.judge(recipe) if recipe else [])]
