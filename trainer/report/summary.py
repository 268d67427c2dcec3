"""The summary of a run: before/after on held-out test prompts, with errors of paired differences.

Both evaluations use the same prompts, noise and loss points, so every difference is paired: per prompt for rewards and
diversity, per point for the diffusion loss. 95 % intervals are ± 1.96 standard errors. Invariant: numbers are paired only
where the evaluation set's digest and, for a reward, its revision are the same; what is not paired is named with the reason.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from actors.noise_levels import by_band
from trainer.config.composition import composition
from trainer.config.run import RunConfig

Record = Mapping[str, Any]


def evaluation(folder: Path, step: int, weights: str = "raw", split: str = "test") -> dict[str, Any] | None:
    """A stored evaluation, or None."""
    path = folder / "eval" / f"{split}-{step:06d}-{weights}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def paired(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Mean and standard error of the paired differences. Raises ValueError on unequal lengths."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def unpaired(before: Record, after: Record, reward: str | None = None) -> str:
    """Why two evaluations, or one reward of them, may not be paired; empty if they may."""
    if before.get("set") is None or after.get("set") is None:
        return "the evaluation set is not known"
    if before["set"] != after["set"]:
        return f"another evaluation set ({before['set']}, {after['set']})"
    if reward is None:
        return ""
    name = reward.partition(".")[0]
    one, two = (record.get("revisions", {}).get(name) for record in (before, after))
    return "" if one == two else f"another revision of {name} ({one}, {two})"


def _change(before: Sequence[float | None], after: Sequence[float | None], name: str, relative: bool = False) -> dict[str, Any]:
    """`name`, its standard error, 95 % interval and number of pairs; nothing with fewer than two pairs."""
    pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
    if len(pairs) < 2:
        return {}
    change, error = paired([a for a, _ in pairs], [b for _, b in pairs])
    unit = statistics.fmean(a for a, _ in pairs) if relative else 1.0
    change, error = change / unit, error / unit
    prefix = f"{name}_" if relative else ""
    return {name: change, f"{prefix}stderr": error, f"{prefix}ci95": [change - 1.96 * error, change + 1.96 * error], f"{prefix}pairs": len(pairs)}


def changes(before: Record, after: Record) -> dict[str, Any]:
    """Paired changes between two evaluations with their per-prompt numbers: `rewards` and `sub_scores` by name (differences),
    diffusion loss and diversity (relative to their mean before), and under `unpaired` what could not be paired and why."""
    one, two = before["per_prompt"], after["per_prompt"]
    why = unpaired(before, after)
    found: dict[str, Any] = {"rewards": {}, "sub_scores": {}, "unpaired": {"all": why} if why else {}}
    if why:
        return found
    for section in ("rewards", "sub_scores"):
        for name in [n for n in one[section] if n in two[section]]:
            reason = unpaired(before, after, name)
            if reason:
                found["unpaired"][name] = reason
            else:
                found[section][name] = _change(one[section][name], two[section][name], "gain")
    for key, name in (("diffusion_loss", "diffusion_loss_rise"), ("diversity", "diversity_change")):
        found |= _change(one[key], two[key], name, relative=True)
    if bands := _bands(one, two):
        found["diffusion_loss_bands"] = bands
    return found


def _bands(one: Record, two: Record) -> dict[str, dict[str, Any]]:
    """Relative changes of the diffusion loss in each band of the noise levels; nothing of evaluations without levels, or of few points."""
    levels = one.get("noise_level")
    if levels is None or levels != two.get("noise_level"):
        return {}
    before, after = (by_band(levels, record["diffusion_loss"]) for record in (one, two))
    found = {}
    for name in before:
        change = _change(before[name], after[name], "change", relative=True)
        found[name] = {"before": statistics.fmean(before[name]), "after": statistics.fmean(after[name])}
        found[name] |= {key.removeprefix("change_"): value for key, value in change.items()}
    return found


def summarise(config: RunConfig, folder: Path, step: int, groups: int, wall_seconds: dict[str, float]) -> dict[str, Any]:
    """The content of summary.json. Values whose evaluation is missing are left out."""
    summary: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "objective": composition(config.objective),
        "updates": step,
        "groups": groups,
        "wall_seconds": {k: round(v, 1) for k, v in wall_seconds.items()},
        "rewards": {},
        "sub_scores": {},
    }
    before, after = evaluation(folder, 0), evaluation(folder, step)
    for label, record in (("before", before), ("after", after), ("after_ema", evaluation(folder, step, "ema"))):
        if record is None:
            continue
        for name in record["per_prompt"]["rewards"]:
            summary["rewards"].setdefault(name, {"trained": name not in config.held_out_rewards})
        for section in ("rewards", "sub_scores"):
            for name, value in record[section].items():
                summary[section].setdefault(name, {})[label] = value
        summary |= {f"{key}_{label}": record[key] for key in ("diffusion_loss", "diversity")}
        summary |= {"prompts": record["prompts"], "evaluation_set": record.get("set"), "revisions": record.get("revisions", {})}
        for name, count in record.get("failed", {}).items():
            reason = record.get("first_failure", {}).get(name.partition(".")[0], "")
            summary.setdefault("failed_scores", {}).setdefault(name, {"first_reason": reason})[label] = count
    if before is not None and after is not None:
        found = changes(before, after)
        for section in ("rewards", "sub_scores"):
            for name, change in found.pop(section).items():
                summary[section].setdefault(name, {}).update(change)
        summary |= {key: value for key, value in found.items() if value}
    return summary


def last_test(folder: Path) -> dict[str, Any] | None:
    """The newest test evaluation of the raw weights after the start; None while there is only the start's."""
    steps = sorted(int(file.stem.split("-")[1]) for file in (folder / "eval").glob("test-*-raw.json"))
    return evaluation(folder, steps[-1]) if steps and steps[-1] else None


def reward_against(reference: Path, other: Path, reward: str) -> tuple[float, float] | str:
    """Mean and standard error of (other - reference) of a reward's final test scores, paired by prompt; or, in words, why they
    cannot be compared."""
    first, second = last_test(reference), last_test(other)
    if first is None or second is None:
        return f"no evaluation after training in {reference.name if first is None else other.name}"
    for record, folder in ((first, reference), (second, other)):
        if reward not in record["per_prompt"]["rewards"]:
            return f"not scored in {folder.name}"
    why = unpaired(first, second, reward)
    if why:
        return why
    found = _change(first["per_prompt"]["rewards"][reward], second["per_prompt"]["rewards"][reward], "gain")
    return (found["gain"], found["stderr"]) if found else "fewer than two prompts have both scores"
