"""Which policy a command draws with: what a recipe starts from, the newest export of a run, or an exported folder.

recipe.yaml           model.path of the recipe, which no training of it has changed
runs/NAME             its newest export, raw or (`ema`) averaged; runs/NAME/config.yaml means the same
…/step-000100, …      that folder; sampler settings are those of the run that made it, where that can be told
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import yaml

from trainer.cli.recipe import read_recipe
from trainer.config.errors import ConfigError
from trainer.config.load import apply_overrides, load_config, parse_config
from trainer.config.run import RunConfig

DRAWN_WITH = ("name", "seed", "model", "sampler", "prompts")
"""What of the recipe beside an exported policy says how it is drawn."""
RUN_FILES = ("lock", "metrics.jsonl", "exports", "checkpoints")
"""What a folder beside its config.yaml holds once a run has begun in it."""


@dataclass(frozen=True)
class PolicySource:
    """Settings whose `model.path` is the policy, and what to call it.

    Attributes:
        step: updates that it has seen; None where that cannot be told.
        weights: `raw`, `ema`, or `start` for a policy as its recipe starts from it.
    """

    config: RunConfig
    step: int | None
    weights: str

    @property
    def path(self) -> str:
        return self.config.model.path

    def __str__(self) -> str:
        if self.weights == "start":
            drawn = ", random weights" if self.config.model.init else ""
            return f"policy {self.path}{drawn}: what the recipe starts from, untrained by it"
        return f"policy {self.path}: {self.weights} weights" + ("" if self.step is None else f" of step {self.step}")


def policy_source(where: Path, overrides: list[str], ema: bool = False, tiny: bool = False) -> PolicySource:
    """Find the policy that `where` names; `tiny`: of a recipe made tiny. Raises ConfigError."""
    if where.name == "config.yaml" and any((where.parent / name).exists() for name in RUN_FILES):
        where = where.parent
    if where.is_dir() and tiny:
        raise ConfigError(f"--tiny is for a recipe; {where} is a folder whose policy is as large as it is")
    if where.is_dir() and (where / "transformer" / "config.json").exists():
        if ema:
            raise ConfigError(f"{where} is one exported policy; --ema chooses among a run's exports: give the run's folder")
        return _of(_settings_of(where, overrides), where)
    if where.is_dir():
        if not (where / "config.yaml").exists():
            raise ConfigError(f"{where} is neither a run folder (config.yaml) nor an exported policy (transformer/config.json)")
        return _of(load_config(where / "config.yaml", overrides), newest_export(where, ema))
    if ema:
        raise ConfigError(f"--ema needs a run folder; {where} is a recipe, which starts from one policy")
    return PolicySource(read_recipe(where, overrides, tiny, data=False)[0], None, "start")


def policy_beside(where: Path, config: RunConfig, overrides: list[str]) -> PolicySource:
    """The policy that `where` names, under the settings of another: a run's newest export, an exported folder, or what a recipe starts from.
    Raises ConfigError."""
    if not where.is_dir():
        return policy_source(where, overrides)
    exported = (where / "transformer" / "config.json").exists()
    if not exported and not (where / "config.yaml").exists():
        raise ConfigError(f"{where} is neither a run folder (config.yaml) nor an exported policy (transformer/config.json)")
    return _of(config, where if exported else newest_export(where, False))


def newest_export(run: Path, ema: bool) -> Path:
    """The newest complete export of a run. Raises ConfigError where there is none."""
    exports = [f for f in (run / "exports").glob("step-*") if f.name.endswith("-ema") == ema and f.suffix != ".partial"]
    if not exports:
        kind = "averaged policy" if ema else "policy"
        raise ConfigError(f"run {run} holds no exported {kind} yet; the first is written with its first checkpoint. Its recipe draws the starting policy")
    return max(exports)


def _of(config: RunConfig, policy: Path) -> PolicySource:
    lora = config.model.lora.model_copy(update={"rank": 0, "merge": False})  # exports hold the adapter merged
    model = config.model.model_copy(update={"path": str(policy), "revision": None, "init": False, "base_dtype": "float32", "lora": lora})
    made = policy / "provenance.json"
    known = json.loads(made.read_text()) if made.exists() else {}
    parts = policy.name.split("-")
    step = known.get("step", int(parts[1]) if len(parts) > 1 and parts[0] == "step" and parts[1].isdecimal() else None)
    weights = known.get("weights", "ema" if policy.name.endswith("-ema") else "raw")
    return PolicySource(config.model_copy(update={"model": model}), step, weights)


def _settings_of(policy: Path, overrides: list[str]) -> RunConfig:
    """Settings of the run that made an exported policy; the defaults where nobody says."""
    made, run = policy / "provenance.json", policy.parent.parent / "config.yaml"
    if made.exists():
        tree = yaml.safe_load(json.loads(made.read_text())["recipe"])
        try:
            parse_config(tree)
        except ConfigError:  # of another version: what has nothing to do with drawing may have had other keys
            tree = {key: value for key, value in tree.items() if key in DRAWN_WITH}
        return parse_config(apply_overrides(tree, overrides))
    if policy.parent.name == "exports" and run.exists():
        return load_config(run, overrides)
    return parse_config(apply_overrides({"name": policy.name}, overrides))
