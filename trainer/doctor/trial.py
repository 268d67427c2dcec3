"""Gathering: a recipe's own first groups and updates, in a process of their own: `python -m trainer.doctor.trial < config.yaml`.

Scorers pass their self-test; a few groups of the starting policy are sampled and scored; their transitions are replayed; both terms of the loss
have their gradients; then some updates on one prompt, which must not break the policy. The last line of the output is one JSON object.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from statistics import fmean, stdev
from typing import Any

import torch
import yaml

from actors.sources.draws import held_out_rows
from actors.sources.latents import clean_latents
from diffusion.evaluation import diffusion_losses
from diffusion.seeds import generator
from trainer.config.errors import ConfigError
from trainer.config.load import parse_config
from trainer.config.run import RunConfig
from trainer.doctor.facts import Trial
from trainer.learn.batch import take
from trainer.learn.objective import Transitions, policy_terms
from trainer.learn.selftest import SHARE
from trainer.solo.loop import Round, SoloLoop

GROUPS, UPDATES, LEAST_UPDATES, SECONDS = 6, 12, 6, 45.0
"""Groups that are looked at; updates on one prompt, at most, at least, and how long others may begin."""
ONE_PROMPT_GROUPS = 2
POINTS = 128


def rehearsal(config: RunConfig) -> RunConfig:
    """The recipe for a few updates on one prompt: nothing of the loss is changed, and no warm-up hides the learning rate. Of a claim of two groups,
    each update takes both."""
    tree = config.model_dump()
    tree["rollout"]["groups_per_step"], tree["data"]["batch_size"], tree["updates"] = ONE_PROMPT_GROUPS, None, UPDATES
    tree["optimizer"] |= {"warmup": 0, "decay": "none", "ema": 0.0}
    tree["learner"] |= {"ranks": 1, "replicas": 1, "sequence_ranks": 1, "updates_per_claim": 1}
    tree["replay"]["drop_zero_variance"] = False
    return parse_config(tree)


class _Stage(Exception):
    """What was being done when something failed."""


@contextmanager
def _stage(name: str) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, ConfigError):
        raise
    except Exception as error:  # whatever it is, the doctor tells of it
        raise _Stage(name, " ".join(f"{type(error).__name__}: {error}".split())[:400]) from error


def trial(config: RunConfig, threads: int, loop_class: type[SoloLoop] = SoloLoop) -> Trial:
    """Facts of a trial. Raises nothing but KeyboardInterrupt: what fails is one of them."""
    found = Trial()
    try:
        with _stage("start"):
            loop = loop_class(rehearsal(config), threads)
        with _stage("reward"):
            for scorers in loop.scorers.values():
                scorers[0].self_test()
            found = replace(found, scorers=tuple(loop.scorers))
        with _stage("sampling and scoring"):
            made = loop.round(range(GROUPS))
            found = replace(found, **_rewards(made, loop))
        with _stage("log-probability"):
            first = _first(made, ONE_PROMPT_GROUPS)
            batches = loop.batches(1, first)
            found = replace(found, **_deviation(loop, batches[0].transitions, batches[0]))
        with _stage("gradients"):
            found = replace(found, **_gradients(loop, batches))
        with _stage("updates"):
            found = _updates(loop, found, made)
    except ConfigError as error:
        return replace(found, skipped=str(error))
    except _Stage as failed:
        stage, what = failed.args
        return replace(found, stage=stage, error=what)
    return found


def _first(made: Round, count: int) -> Round:
    return replace(made, groups=made.groups[:count], prompts=made.prompts[:count], trajectories=made.trajectories[:count], judged=made.judged[:count])


def _rewards(made: Round, loop: SoloLoop) -> dict[str, Any]:
    totals = [judged.totals for judged in made.judged]
    every = [total for group in totals for total in group]
    asked = len(every) * len(loop.rewards.trained)
    return {
        "means": tuple(fmean(group) for group in totals),
        "spreads": tuple(stdev(group) if len(group) > 1 else 0.0 for group in totals),
        "top": sum(math.isclose(total, max(every)) for total in every) / len(every),
        "missing": sum(judged.failures for judged in made.judged) / asked,
    }


@torch.no_grad()
def _deviation(loop: SoloLoop, rows: Any, batch: Any) -> dict[str, Any]:
    """Transitions replayed by the weights that sampled them."""
    if not isinstance(rows, Transitions):
        return {}
    config, learner, largest = loop.config, loop.learner, 0.0
    for start in range(0, len(rows.t), config.learner.micro_batch):
        part = take(rows, slice(start, start + config.learner.micro_batch), learner.device)
        stats = policy_terms(learner.replay(part, batch.conditioning_of(part)), None, part, learner.kernel, config.objective)[1]
        largest = max(largest, float(stats["ratio_deviation_rows"].double().nan_to_num(nan=math.inf).max()))
    if not math.isfinite(largest):
        raise ArithmeticError("a replayed transition has a ratio that is not finite")
    return {"deviation": largest, "limit": SHARE * config.objective.clip}


def _gradients(loop: SoloLoop, batches: list[Any]) -> dict[str, Any]:
    """Norms of the gradients of the policy's terms and of the data term, and their cosine."""
    learner = loop.learner
    vectors = []
    (whole,) = learner._with_old(batches)
    for batch in (replace(whole, anchors=None), replace(whole, transitions=None)):
        learner.optimizer.zero_grad()
        for compute in learner._losses(batch, learner.sums()):
            compute().backward()
        vectors.append([torch.zeros_like(p) if p.grad is None else p.grad for p in learner.model.parameters() if p.requires_grad])
        learner.optimizer.zero_grad()
    policy, data = (math.sqrt(sum(float(g.double().square().sum()) for g in vector)) for vector in vectors)
    found: dict[str, Any] = {"policy_gradient": policy}
    if loop.config.uses_data:
        dot = sum(float((a.double() * b.double()).sum()) for a, b in zip(*vectors, strict=True))
        found |= {"data_gradient": data, "cosine": dot / (policy * data) if policy and data else None}
    return found


def _updates(loop: SoloLoop, found: Trial, made: Round) -> Trial:
    """Updates on the prompt whose rewards vary most; the loss before them and after."""
    chosen = max(range(len(made.prompts)), key=lambda i: found.spreads[i])
    rewards, spread, started = list[float](), list[float](), time.monotonic()

    def update(step: int) -> None:
        done = loop.round(loop.groups_of(step), made.prompts[chosen])
        totals = [total for judged in done.judged for total in judged.totals]
        rewards.append(fmean(totals))
        spread.append(stdev(totals) / math.sqrt(len(totals)))
        norm = loop.learner.update(loop.batches(step, done), step).get("grad_norm", math.nan)
        if not math.isfinite(norm):
            raise ArithmeticError(f"the gradient of update {step} is not finite")

    before = _loss(loop)
    for step in range(1, UPDATES + 1):
        if step > LEAST_UPDATES and time.monotonic() - started > SECONDS:
            break
        update(step)
    return replace(
        found,
        prompt=made.prompts[chosen],
        rewards=tuple(rewards),
        reward_error=fmean(spread),
        loss_before=before,
        loss_after=_loss(loop),
    )


@torch.no_grad()
def _loss(loop: SoloLoop) -> float | None:
    """Diffusion loss on fixed points of the anchor data that training does not see; None without."""
    config, learner = loop.config, loop.learner
    if not config.uses_data:
        return None
    examples = [example for _, example in held_out_rows(loop.data, "dev", POINTS)]
    x0 = clean_latents(examples, loop.policy.codec, config.sampler.height, config.sampler.width, config.sampler.frames).cpu()
    g = generator("evaluation", "loss", "dev")
    t = loop.policy.process.spread_times((torch.arange(len(x0)) + torch.rand(len(x0), generator=g)) / len(x0))
    eps = torch.randn(x0.shape, generator=g)
    shown = loop.policy.text_encoder.encode([example.text for example in examples])
    losses = diffusion_losses(learner.model, loop.policy.process, x0, eps, t, shown, config.learner.micro_batch, config.model.dtype, learner.device)
    return float(losses.mean())


def main() -> None:
    config = parse_config(yaml.safe_load(sys.stdin))
    found = trial(config, min(len(os.sched_getaffinity(0)), 8))
    values = {name: value for name, value in vars(found).items() if not (isinstance(value, float) and not math.isfinite(value))}
    print(json.dumps(values))


if __name__ == "__main__":
    main()
