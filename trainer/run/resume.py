"""Going on with a run: where it stands, whether the recipe given is still the same run, and what lies beyond its checkpoint.

Invariant: what a folder tells of steps after the last registered checkpoint belongs to a history that is cut off; it is removed
before the run goes on, so nothing stands twice and no picture shows other weights than its name says.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.run.lines import lines_of

RESUMABLE = ("updates", "checkpoint_every", "max_dead_groups", "stop_deadline_s", "wandb_project", "learner", "evaluation", "hacking", "redis", "ray")
"""Settings that may change when a run goes on; the others would make it another run."""
LEARNT_WITH = {"learner": ("updates_per_claim",)}
"""Keys of such sections that say what is learnt, and may not."""
INFRASTRUCTURE = {
    "weights": ("transport", "path"),
    "fleet": ("url", "api_key_env", "timeout_s", "host", "port", "hosts", "keys_file", "start_timeout_s", "drain_s", "ingress", "limits"),
}
"""Keys of a section that say where and how fast something runs, not what it answers; of each reward in `fleet.rewards`: `SCALE`."""
SCALE = ("replicas", "cpus", "gpus", "batch_items", "batch_wait_s", "timeout_s", "max_queued", "target_ongoing")


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """Dotted keys that differ and may not differ on resume."""
    one, two = before.model_dump(mode="json"), now.model_dump(mode="json")
    found = []
    for section, keys in LEARNT_WITH.items():
        found += [f"{section}.{key}" for key in keys if one[section][key] != two[section][key]]
    for section in one.keys() - set(RESUMABLE):
        if isinstance(one[section], dict):
            may = INFRASTRUCTURE.get(section, ())
            found += [f"{section}.{key}" for key in _different(_plain(one[section]), _plain(two[section])) if key not in may]
        elif one[section] != two[section]:
            found.append(section)
    return sorted(found)


def _different(one: dict[str, Any], two: dict[str, Any]) -> list[str]:
    return [key for key in one.keys() | two.keys() if one.get(key) != two.get(key)]


def _plain(section: dict[str, Any]) -> dict[str, Any]:
    """A section with its rewards' scale left out: how many replicas answer does not change the answer."""
    rewards = section.get("rewards")
    if not isinstance(rewards, dict):
        return section
    return section | {"rewards": {name: {k: v for k, v in entry.items() if k not in SCALE} for name, entry in rewards.items()}}


def refuse_fewer_updates(config: RunConfig, step: int) -> None:
    """Raises ConfigError when the run has already done more than it is asked for."""
    if config.updates < step:
        raise ConfigError(f"updates={config.updates}, but the run has a checkpoint of update {step}; give at least updates={step}, or start a new run")


def registered_step(checkpoints: Path) -> int:
    """Step of the checkpoint that Ray Train will go on from; 0 when none is registered."""
    try:
        newest = json.loads((checkpoints / "checkpoint_manager_snapshot.json").read_text())["latest_checkpoint_result"]
        return int(str(newest["checkpoint_dir_name"]).removeprefix("step-"))
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def finished_updates(folder: Path) -> int:
    """Updates that a run folder tells of: of its newest metrics line or checkpoint, 0 when it never finished one."""
    steps = [int(record.get("step", 0)) for record in lines_of(folder / "metrics.jsonl") if record.get("kind") == "update"]
    return max([registered_step(folder / "checkpoints"), *steps])


def forget_after(folder: Path, step: int) -> None:
    """Remove evaluations, grids and evaluation lines of steps > `step`."""
    for file in [*folder.glob("eval/*-*-*.json"), *folder.glob("samples/step-*.png"), *folder.glob("samples/step-*.mp4")]:
        number = file.stem.split("-")[1]
        if number.isdecimal() and int(number) > step:
            file.unlink()
    path = folder / "evaluations.jsonl"
    if path.exists():
        kept = [record for record in lines_of(path) if int(record.get("step", 0)) <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(record) + "\n" for record in kept))
        partial.rename(path)
