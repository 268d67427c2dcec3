"""The rewards of a run from its settings: what generators and evaluations are given, and whether a reward can take the prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from actors.groups import Weighted, fps_of
from actors.rewards import RunRewards
from actors.sources.draws import held_out_prompts, prompt_source, training_example
from diffusion.checkpoint import samples_clips
from diffusion.source import locate
from services.client.base import RewardError
from services.config import fleet_of
from services.contract import ScoreFailure
from services.terms import Term
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.run.errors import RunFailed

PROBES = 4
"""Training prompts, and as many held-out ones, that every reward is tried on at start."""


def run_rewards(config: RunConfig) -> RunRewards:
    """What the run's actors are given. Its own fleet is an application of its own, so that two runs share nothing."""
    ours = config.fleet.url is None and bool(config.reward_names)
    fleet = fleet_of(config.fleet, config.reward_names).located(Path.cwd()) if ours else config.fleet
    terms = tuple(Weighted(Term.parse(name), term.weight, term.clip) for name, term in config.rewards.items())
    held_out = tuple(Term.parse(name) for name in config.held_out_rewards)
    return RunRewards(fleet, f"run-{config.name}", terms, held_out, config.objective.failed_reward == "fill_mean")


def check_rewards(config: RunConfig, rewards: RunRewards) -> dict[str, str]:
    """Try every reward on blank pictures with a few of the run's own prompts; returns the revision of each.

    Raises:
        RunFailed: a reward that does not answer.
        ConfigError: one that lacks a sub-score that the recipe names, or cannot judge the prompts.
    """
    if not rewards.names:
        return {}
    client = rewards.connect()
    source = prompt_source(config.prompts, config.data)
    prompts = [training_example(source, config.seed, group).text for group in range(PROBES)] if config.uses_policy else []
    prompts += held_out_prompts(source, "test", min(PROBES, config.evaluation.test_prompts))
    size = (config.sampler.height, config.sampler.width, 3)
    clips = samples_clips(locate(config.model.path, config.model.revision).folder)
    blank = np.full((len(prompts), config.sampler.frames, *size) if clips else (len(prompts), *size), 255, np.uint8)
    try:
        revisions = {name: info.revision for name, info in client.info(rewards.names).items()}
        scores = client.score_all(rewards.names, prompts, blank, rewards.fleet.timeout_s, fps_of(blank, config.sampler))
    except RewardError as error:
        raise RunFailed("rewards", str(error)) from error
    finally:
        client.close()
    for term in rewards.terms:
        for prompt, score in zip(prompts, scores[term.reward], strict=True):
            if isinstance(score, ScoreFailure):
                if score.retryable:
                    continue
                why = f"{score.code}: {score.message}"
                raise ConfigError(f"reward {term.reward} cannot judge the prompt {prompt!r} ({why}); choose other prompts or rewards ('rewards={{}}' for none)")
            unknown = [sub for sub in term.subs if sub not in score.sub_scores]
            if unknown:
                raise ConfigError(f"reward {term.reward} has no sub-score {unknown[0]!r}; it has {', '.join(sorted(score.sub_scores))}")
    return revisions
