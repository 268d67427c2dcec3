"""What a run asks of Ray, and whether a cluster of a fixed size has it."""

from __future__ import annotations

from collections.abc import Mapping

from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig

CPUS = {"weight store": 0.1, "evaluator": 0.1, "generator": 1.0, "encoder": 1.0, "anchor feeder": 0.5, "rank": 1.0}
"""Logical CPUs of one part each; most of them mostly wait."""


def needs(config: RunConfig, fleet: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Ray CPUs and GPUs of a run by the part that asks for them; `fleet`: what its own reward fleet asks for."""
    generators = config.rollout.generators * config.rollout.sequence_ranks  # processes; evaluations are their work too
    cpus = {
        "rollout.generators": generators * CPUS["generator"],
        "encoder.actors": config.encoder.actors * CPUS["encoder"],
        "learner.ranks": config.learner.ranks * CPUS["rank"],
        "rewards": fleet.get("CPU", 0.0),
        "evaluation, weights and data": CPUS["evaluator"] + CPUS["weight store"] + (CPUS["anchor feeder"] if config.feeds_data else 0.0),
    }
    gpus = {
        "rollout.gpus": generators * config.rollout.gpus,
        "encoder.gpus": config.encoder.actors * config.encoder.gpus,
        "learner.gpus": config.learner.ranks * config.learner.gpus,
        "rewards": fleet.get("GPU", 0.0),
    }
    return {"CPU": cpus, "GPU": gpus}


def check_resources(config: RunConfig, fleet: Mapping[str, float], total: Mapping[str, float]) -> None:
    """Raise ConfigError when a cluster with `total` resources, which will not grow, can never hold the run."""
    for kind, parts in needs(config, fleet).items():
        need = sum(parts.values())
        if need > total.get(kind, 0.0) + 1e-6:
            shares = ", ".join(f"{part} {share:g}" for part, share in parts.items() if share)
            remedy = "raise ray.cpus, or ask for less" if kind == "CPU" else "ask for less, or join a cluster that has them (--ray-address)"
            raise ConfigError(f"the run needs {need:g} Ray {kind}s ({shares}) and this machine's Ray has {total.get(kind, 0.0):g}: {remedy}")
