"""The summary of a run: before/after on held-out test prompts, with errors of paired differences.

Both evaluations use the same prompts, noise and loss points, so every difference is paired: per prompt for the reward,
per point for the diffusion loss, per prompt for diversity. 95 % intervals are ± 1.96 standard errors.
"""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any

from trainer.config.objective import ObjectiveConfig
from trainer.config.run import RunConfig


def evaluation(folder: Path, step: int, weights: str = "raw", split: str = "test") -> dict[str, Any] | None:
    """A stored evaluation, or None."""
    path = folder / "eval" / f"{split}-{step:06d}-{weights}.json"
    if not path.exists():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def paired(before: list[float], after: list[float]) -> tuple[float, float]:
    """Mean and standard error of the paired differences. Raises ValueError on unequal lengths."""
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return statistics.fmean(differences), statistics.stdev(differences) / math.sqrt(len(differences))


def objective_name(objective: ObjectiveConfig) -> str:
    """The preset, and what was set otherwise: `ddrl (data_weight=0)`."""
    plain = ObjectiveConfig(preset=objective.preset)
    weights = [f"{k}={getattr(objective, k):g}" for k in ("policy_weight", "kl_weight", "data_weight") if getattr(objective, k) != getattr(plain, k)]
    return objective.preset + (f" ({', '.join(weights)})" if weights else "")


def changes(before: dict[str, list[float]], after: dict[str, list[float]]) -> dict[str, Any]:
    """Paired changes with standard errors and 95 % intervals. Reward and exact match: differences; diffusion loss and
    diversity: relative to their mean before. Measures with fewer than two values are left out."""
    found: dict[str, Any] = {}
    for name, key, relative in (
        ("ocr_gain", "rewards", False),
        ("exact_match_gain", "exact", False),
        ("diffusion_loss_rise", "diffusion_losses", True),
        ("diversity_change", "diversity", True),
    ):
        if len(before[key]) < 2 or len(before[key]) != len(after[key]):
            continue
        change, error = paired(before[key], after[key])
        unit = statistics.fmean(before[key]) if relative else 1.0
        change, error = change / unit, error / unit
        found |= {name: change, f"{name}_stderr": error, f"{name}_ci95": [change - 1.96 * error, change + 1.96 * error]}
    return found


def summarise(config: RunConfig, folder: Path, step: int, groups: int, wall_seconds: dict[str, float]) -> dict[str, Any]:
    """The content of summary.json. Values whose evaluation is missing are left out."""
    summary: dict[str, Any] = {
        "name": config.name,
        "seed": config.seed,
        "objective": objective_name(config.objective),
        "updates": step,
        "groups": groups,
        "wall_seconds": {k: round(v, 1) for k, v in wall_seconds.items()},
    }
    before, after = evaluation(folder, 0), evaluation(folder, step)
    for label, record in (("before", before), ("after", after), ("after_ema", evaluation(folder, step, "ema"))):
        if record is not None:
            summary |= {
                f"ocr_{label}": record["reward"],
                f"exact_match_{label}": record["exact_match"],
                f"diffusion_loss_{label}": record["diffusion_loss"],
                f"diversity_{label}": record["diversity"],
            }
            summary["prompts"] = record["prompts"]
    if before is not None and after is not None:
        summary |= changes(before["per_prompt"], after["per_prompt"])
    return summary


def reward_against(reference: Path, other: Path) -> tuple[float, float] | None:
    """Mean and standard error of (other - reference) final test rewards, paired by prompt; None when one is missing or
    the prompts differ in number."""
    records = [_last_test(folder) for folder in (reference, other)]
    if any(r is None for r in records):
        return None
    first, second = (r["per_prompt"]["rewards"] for r in records if r is not None)
    return paired(first, second) if len(first) == len(second) else None


def _last_test(folder: Path) -> dict[str, Any] | None:
    files = sorted((folder / "eval").glob("test-*-raw.json"))
    step = int(files[-1].stem.split("-")[1]) if files else 0
    return evaluation(folder, step) if step else None
