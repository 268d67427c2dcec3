"""Held-out evaluations of policies side by side, without a run: one after the other, on the same prompts, noise and loss points.

    Redis → Ray → reward fleet → for each policy: generators that hold it, an evaluator → its folder → end

What comes of a policy is a run folder without updates: the evaluation of the starting policy, its own, both grids, a summary with paired
differences. So `ddrl report` reads it as it reads a run. What a folder holds already is not made again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actors.connect import Target
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.render import render_config
from trainer.config.run import RunConfig
from trainer.plan.storage import buffer_settings
from trainer.report.summary import evaluation, summarise
from trainer.run import cluster
from trainer.run.errors import RunFailed
from trainer.run.folder import RunFolder
from trainer.run.preflight import check_policy
from trainer.run.signals import StopSignals

POLL_S = 0.25


@dataclass(frozen=True)
class Candidate:
    """A policy under evaluation.

    Attributes:
        name: of its folder; unique.
        config: settings with it as the starting policy.
        step: updates it has seen, at least 1; 0 for the policy that others are held against.
    """

    name: str
    config: RunConfig
    step: int


def evaluate(candidates: Sequence[Candidate], out: Path, signals: StopSignals, say: Callable[[str], None], deadline_s: float) -> list[Path]:
    """Evaluate each, the first of which is what the others are held against; their folders, in order.

    Args:
        signals: what was asked of the process; installed.
        say: told what is going on.
        deadline_s: for one policy, its generators' start included.
    Raises:
        ConfigError: a policy, or a reward, that does not fit the settings.
        RunFailed: a part that failed, or an evaluation that did not come.
        Interrupted: asked to stop; what was evaluated is kept.
    """
    config = candidates[0].config
    for candidate in candidates:
        _refuse_other(candidate, out / candidate.name / "config.yaml")
    folders = [out / candidate.name for candidate in candidates]
    missing = [(c, folder) for c, folder in zip(candidates, folders, strict=True) if not _done(folder, c.step)]
    for candidate, _ in missing:
        check_policy(candidate.config)
    with ExitStack() as stack:
        if missing:
            say("Starting Redis, Ray and the reward fleet")
            start = _Started(config, out, stack, signals)
        for candidate, folder in missing:
            say(f"Evaluating {candidate.name}: {candidate.config.model.path}")
            began = time.monotonic()
            start.evaluate(candidate, folder, deadline_s)
            say(f"{candidate.name} took {time.monotonic() - began:.0f} s")
    for candidate, folder in zip(candidates, folders, strict=True):
        _write(candidate, folder, folders[0])
    return folders


class _Started:
    """What all policies share."""

    def __init__(self, config: RunConfig, out: Path, stack: ExitStack, signals: StopSignals) -> None:
        from trainer.run.rewards import check_rewards, run_rewards

        self.rewards = run_rewards(config)
        url = cluster.start_redis(config.redis, RunFolder(out), 0, stack)
        self.target = Target(url, f"{config.name}-eval", buffer_settings(config), "redis")  # generators connect to it, and lease nothing
        with signals.held():
            cluster.start_ray(config.ray, stack)
        cluster.check_nodes(config, self.rewards)
        cluster.start_fleet(self.rewards, config.ray.address is not None, stack)
        check_rewards(config, self.rewards)

    def evaluate(self, candidate: Candidate, folder: Path, deadline_s: float) -> None:
        from trainer.run.parts import Parts

        folder.mkdir(parents=True, exist_ok=True)
        parts, end = Parts(candidate.config, self.target, RunFolder(folder)), time.monotonic() + deadline_s
        try:
            parts.create_actors(self.rewards, learns=False)
            parts.await_generators()
            jobs = parts.evaluate_start(candidate.step)
            while jobs:
                results = parts.collect(jobs)
                for name, why in (results.broken | results.gone).items():
                    raise RunFailed("evaluator", f"{candidate.name}, {name}: {why}")
                if jobs and time.monotonic() > end:
                    raise RunFailed("evaluator", f"{candidate.name}: {', '.join(jobs)} not there after {deadline_s:.0f} s; raise --deadline-s")
                time.sleep(POLL_S)
        finally:
            parts.close()


COMPARED = ("seed", "model", "sampler", "prompts", "data", "rewards", "held_out_rewards", "evaluation")
"""Sections of the settings that make an evaluation what it is."""


def _refuse_other(candidate: Candidate, made: Path) -> None:
    """Raise ConfigError where the folder of a candidate holds another policy, or an evaluation of other settings."""
    if not made.exists():
        return
    now, before = (c.model_dump(mode="json") for c in (candidate.config, load_config(made)))
    changed = [section for section in COMPARED if now[section] != before[section]]
    if changed:
        raise ConfigError(f"{made.parent} holds an evaluation with other settings ({', '.join(changed)}); choose another --out, or remove it")


def _done(folder: Path, step: int) -> bool:
    return evaluation(folder, step) is not None and (folder / "samples" / f"{'after' if step else 'before'}.png").exists()


def _write(candidate: Candidate, folder: Path, start: Path) -> None:
    """The files by which a report reads the folder as a run's."""
    if candidate.step:
        for part in ("eval/test-000000-raw.json", "samples/before.png", "samples/before.mp4"):
            if (start / part).exists():
                shutil.copyfile(start / part, folder / part)
    run = RunFolder(folder)
    named = candidate.config.model_copy(update={"name": candidate.name})
    (folder / "config.yaml").write_text(render_config(named, ()))
    run.evaluations.unlink(missing_ok=True)
    for step in sorted({0, candidate.step}):
        record: dict[str, Any] = {k: v for k, v in (evaluation(folder, step) or {}).items() if k != "per_prompt"}
        run.append_evaluation(record)
    run.summary.write_text(json.dumps(summarise(named, folder, candidate.step, 0, {}), indent=2) + "\n")
    run.mark("finished", status=0)
