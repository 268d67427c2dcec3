"""Judging: a recipe and what it needs. Pure functions of facts."""

from __future__ import annotations

from trainer.doctor.facts import Recipe, Service
from trainer.doctor.finding import Finding


def judge(facts: Recipe) -> list[Finding]:
    """All that is said of a recipe; of one that cannot be read only that."""
    if facts.error:
        return [Finding("recipe", "problem", facts.error, "mend the recipe; `ddrl config` prints what every key means")]
    return [Finding("recipe", "ok", f"{facts.path} is valid, run {facts.name}"), files(facts), *extras(facts), *plan(facts), *map(service, facts.services)]


def files(facts: Recipe) -> Finding:
    """Are its files there, and do they fit?"""
    if facts.files_error:
        return Finding("recipe files", "problem", facts.files_error, "`ddrl config` says the same until it is mended")
    if facts.access is not None and facts.access.error:
        return Finding("recipe files", "problem", facts.access.error, "`hf auth login`, or set model.path to a folder")
    if facts.hub:
        return Finding("recipe files", "warning", f"{facts.hub} is not in the hub's cache: a run downloads it first", f"hf download {facts.hub}")
    return Finding("recipe files", "ok", "policy, prompts and data are there")


def extras(facts: Recipe) -> list[Finding]:
    """Packages that this recipe needs beside ddrl's own."""
    what = "not installed, and the recipe needs it"
    return [Finding(f"package {module}", "problem", what, f"pip install 'ddrl[{extra}]'") for module, extra in facts.lacking.items()]


def plan(facts: Recipe) -> list[Finding]:
    """Does it fit the GPUs of this machine?"""
    if facts.plan_error and facts.hub:
        return [Finding("plan", "warning", f"not made: {facts.plan_error}", f"download {facts.hub} first")]
    if facts.plan_error:
        return [Finding("plan", "problem", facts.plan_error, "`ddrl plan` says the same until it is mended")]
    if facts.plan is None:
        return []
    if not facts.plan.where:
        return [Finding("plan", "ok", "the run joins a cluster, whose GPUs are not looked at; `ddrl plan RECIPE --gpus N --gpu KIND`")]
    if facts.plan.errors:
        more = f" (and {len(facts.plan.errors) - 1} more)" if len(facts.plan.errors) > 1 else ""
        nearest = f"nearest change: {facts.plan.nearest}; " if facts.plan.nearest else ""
        return [Finding("plan", "problem", f"does not fit {facts.plan.where}: {facts.plan.errors[0]}{more}", f"{nearest}`ddrl plan` shows the sums")]
    return [Finding("plan", "ok", f"fits {facts.plan.where}")]


def service(facts: Service) -> Finding:
    """Does it answer?"""
    if facts.error:
        return Finding(facts.what, "problem", facts.error, f"start it, or change {facts.what} (now {facts.where})")
    return Finding(facts.what, "ok", f"{facts.where}: {facts.answer}")
