"""The rule of `--tiny`: how far the numbers of a recipe shrink, so that two cores do it in minutes. Weights: `trainer.run.tiny`.

Invariant: no key comes or goes, and nothing but sizes changes: kinds, kernel, noise, guidance, types, adapter, losses, optimiser stay as
they are. A number only ever falls, GPUs fall to none, and what the command line sets stays.

Worked example: of 10 steps, of which 0 … 8 are trained, 4 are left, of which 0, 1, 2 are trained; 512 x 768 pixels become 32 x 48.
A clip of 81 frames has 9, which are 4 k + 1 as a clip's VAE wants them; how many a second stays.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from diffusion.config import SamplerConfig
from diffusion.kernel_names import stochastic_steps
from services.config import FleetConfig
from trainer.config.run import RunConfig

SIDE, MULTIPLE, LONGEST = 32, 16, 256
"""Pixels: what the shorter side becomes, of what both are multiples, and how long the longer may be."""
STEPS, RANKS, MIB = 4, 2, 1 << 20

MOST: dict[str, int] = {
    "updates": 4,
    "checkpoint_every": 2,
    "sampler.eval_steps": 6,
    "sampler.frames": 9,
    "rollout.generators": 1,
    "rollout.group_size": 4,
    "rollout.threads": 1,
    "rollout.gpus": 0,
    "encoder.gpus": 0,
    "encoder.threads": 1,
    "learner.gpus": 0,
    "learner.threads": 1,
    "replay.max_bytes": 256 * MIB,
    "evaluation.every": 2,
    "evaluation.dev_prompts": 4,
    "evaluation.test_prompts": 8,
    "evaluation.loss_points": 16,
    "evaluation.diversity_prompts": 4,
    "evaluation.diversity_samples": 2,
    "evaluation.grid_prompts": 8,
}
"""Numbers of a recipe, and the most that is left of each. What hangs together is in `shrunk`."""


def shrunk(config: RunConfig, fixed: Collection[str] = ()) -> dict[str, Any]:
    """The numbers that fall, by dotted key.

    Args:
        config: the recipe, with what the command line sets.
        fixed: dotted keys that the command line sets; others are chosen to go with them.
    """
    low: dict[str, Any] = {key: min(value_at(config, key), most) for key, most in MOST.items()}
    low |= _pictures(config.sampler, fixed) | _steps(config.sampler, fixed) | _rewards(config.fleet)
    ranks = config.learner.ranks if "learner.ranks" in fixed else min(config.learner.ranks, RANKS)
    size = config.rollout.group_size if "rollout.group_size" in fixed else low["rollout.group_size"]
    replicas = config.learner.replicas if "learner.replicas" in fixed else 1
    sequence = config.learner.sequence_ranks if "learner.sequence_ranks" in fixed else min(config.learner.sequence_ranks, max(1, ranks // replicas))
    low |= {"learner.replicas": replicas, "learner.sequence_ranks": sequence, "rollout.sequence_ranks": min(config.rollout.sequence_ranks, RANKS)}
    low |= {"learner.ranks": ranks, "rollout.groups_per_step": min(config.rollout.groups_per_step, max(ranks, RANKS))}
    if config.rollout.min_group_size is not None:
        low["rollout.min_group_size"] = min(config.rollout.min_group_size, size)
    if config.data.batch_size is not None:
        groups = config.rollout.groups_per_step if "rollout.groups_per_step" in fixed else low["rollout.groups_per_step"]
        low["data.batch_size"] = groups * size if config.uses_policy else min(config.data.batch_size, 4 * max(ranks, RANKS))
    return {key: value for key, value in low.items() if value != value_at(config, key)}


def value_at(config: RunConfig, key: str) -> Any:
    """The value of a dotted key, names of rewards under `fleet.rewards` included."""
    value: Any = config
    for part in key.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


def _pictures(sampler: SamplerConfig, fixed: Collection[str]) -> dict[str, Any]:
    """Both sides, their ratio about the same."""
    sides = {key: side for key, side in (("sampler.height", sampler.height), ("sampler.width", sampler.width)) if key not in fixed}
    scale = SIDE / min(sides.values(), default=SIDE)
    return {key: min(LONGEST, MULTIPLE * round(scale * side / MULTIPLE)) for key, side in sides.items()} if scale < 1 else {}


def _steps(sampler: SamplerConfig, fixed: Collection[str]) -> dict[str, Any]:
    """Fewer steps, and of those that are trained the ones that are left."""
    if "sampler.trained_steps" in fixed:
        return {}
    steps = sampler.steps if "sampler.steps" in fixed else min(sampler.steps, STEPS)
    count, trained = stochastic_steps(sampler.kernel, steps), sampler.trained_steps
    if isinstance(trained, int):
        return {"sampler.steps": steps, "sampler.trained_steps": min(trained, count)}
    return {"sampler.steps": steps, "sampler.trained_steps": [i for i in trained if i < count] or [0]}


def _rewards(fleet: FleetConfig) -> dict[str, Any]:
    """One replica of each, on a CPU."""
    low: dict[str, Any] = {}
    for name, reward in fleet.rewards.items():
        low |= {f"fleet.rewards.{name}.device": "cpu", f"fleet.rewards.{name}.gpus": 0.0}
        if reward.replicas.max > 1:
            low[f"fleet.rewards.{name}.replicas"] = {"min": 1, "max": 1}
    return low
