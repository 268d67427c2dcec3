"""The bare loop that benchmarks/pipeline.py holds ddrl against: sample, score, learn, in one process, one after the other.

    python -m benchmarks.bare RECIPE UPDATES FILE [--set KEY=VALUE …]

The same groups (prompts, noise, trained steps), the same engine, scorer, objective and optimiser, on all cores; no Ray, no
Redis, no HTTP, no FSDP. The engine samples with the learner's own module, so no weights are copied. Every thread of the
machine is used: torch on all cores, a scorer of one thread for each core. Writes what each update took to FILE, in the
form of a run's metrics.jsonl.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import torch

from actors.groups import group_payload, group_request, judge
from actors.payload import DataPayload, encode
from actors.sources.draws import data_source, prompt_source, training_batch, training_example
from diffusion.checkpoint import load_policy
from diffusion.engine.engine import Engine
from diffusion.families.base import PackedModel
from replay.buffer import ReplayBuffer
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader
from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.registry import build_scorer
from trainer.config.load import load_config
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch
from trainer.learn.learner import BY_STEP, SUMS, Learner, learning_rate
from trainer.run.rewards import run_rewards


class BareLearner(Learner):
    """The learner without its process group: the same losses, clipping, optimiser and average on a plain module."""

    def _spread(self, model: PackedModel) -> None:
        """Nothing is sharded."""

    def update(self, batches: Sequence[StepBatch], step: int) -> dict[str, Any]:
        sums, (batch,) = torch.zeros(len(SUMS) + len(BY_STEP) * self.kernel.steps, dtype=torch.float64), self._with_old(batches)
        for compute in self._losses(batch, sums):
            compute().backward()
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.grad_clip))
        if math.isfinite(norm):
            for group in self.optimizer.param_groups:
                group["lr"] = learning_rate(self.config.optimizer, step, self.decay_updates)
            self.optimizer.step()
            self._update_averages(step)
        self.optimizer.zero_grad()
        policy, data = (float(sums[SUMS.index(name)]) for name in ("policy_loss", "data_loss"))
        return {"grad_norm": norm, "policy_loss": policy / max(1, batch.transition_count), "data_loss": data / max(1, batch.anchor_count)}


class Held:
    """Payloads in this process: what `step_batches` reads."""

    def __init__(self) -> None:
        self.payloads: dict[str, list[bytearray]] = {}

    def read(self, entry: ClaimedGroup | ClaimedData, segments: Sequence[int]) -> list[bytearray]:
        return [self.payloads[entry.ref][i] for i in segments]


class BareLoop:
    """One run of the recipe in one process.

    Args:
        config: the run.
        threads: torch threads, and scorers.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        torch.set_num_threads(threads)
        self.config = config
        self.policy = load_policy(config.model, seed=config.seed)
        self.learner = BareLearner(config, torch.device("cpu"))
        self.engine = Engine(self.learner.model, self.policy.process, config.sampler.max_tokens, config.model.dtype)
        self.shape = self.policy.codec.latent_shape(config.sampler.height, config.sampler.width)
        self.rewards = run_rewards(config)
        (self.reward,) = self.rewards.trained_names  # one is what this loop knows
        self.scorers = [build_scorer(self.rewards.fleet.rewards[self.reward]) for _ in range(threads)]
        self.prompts, self.data = prompt_source(config.prompts, config.data), data_source(config.data)
        self.pool = ThreadPoolExecutor(threads, "scorer")

    def update(self, step: int) -> dict[str, Any]:
        """Update `step`: its groups and data batch, made and learnt from; a line like that of metrics.jsonl."""
        config, held, clock = self.config, Held(), [time.monotonic()]
        first = (step - 1) * config.rollout.groups_per_step
        groups = range(first, first + config.rollout.groups_per_step)
        prompts = [training_example(self.prompts, config.seed, g).text for g in groups]
        texts = self.policy.text_encoder.encode(prompts)
        requests = [
            group_request(config.sampler, config.rollout, config.seed, g, texts[i], None, self.shape, config.replay.store_dtype, config.objective.on_samples)
            for i, g in enumerate(groups)
        ]
        with self.learner.as_old() if self.learner.old else nullcontext():
            trajectories = self.engine.run(requests)
        clock.append(time.monotonic())
        scores = self._score(prompts, [t.latent for t in trajectories])
        clock.append(time.monotonic())
        size, claimed, rewards = config.rollout.group_size, [], list[float]()
        for i, g in enumerate(groups):
            mine = trajectories[i * size : (i + 1) * size]
            held.payloads[str(g)] = encode(group_payload(mine, prompts[i]), getattr(torch, config.replay.store_dtype))
            judged = judge({self.reward: scores[i * size : (i + 1) * size]}, self.rewards.trained, size, size, fill=False)
            header = GroupHeader(judged.totals, size, step - 1, sum(map(len, held.payloads[str(g)])), "", scores=judged.values)
            claimed.append(ClaimedGroup(g, header, str(g)))
            rewards += judged.totals
        data = []
        if config.uses_data:
            held.payloads["data"] = encode(self._anchors(step - 1))
            data = [ClaimedData(step - 1, "data", "")]
        batches = self.learner.batches(cast(ReplayBuffer, held), Claim(step, 0, claimed, data), 0, 1)
        clock.append(time.monotonic())
        stats = self.learner.update(batches, step)
        clock.append(time.monotonic())
        seconds = dict(zip(("sample", "score", "batch", "train"), (b - a for a, b in itertools.pairwise(clock)), strict=True))
        record = {"kind": "update", "time": time.time(), "step": step, "trained_groups": list(groups), "failed_members": 0}
        return record | {"seconds": seconds, "reward_mean": sum(rewards) / len(rewards)} | stats

    def _anchors(self, batch: int) -> DataPayload:
        """Anchor batch `batch`, as the feeder makes it."""
        config = self.config
        captions, pixels = training_batch(
            self.data, config.data.caption_dropout, config.seed, batch, config.data_rows, config.sampler.height, config.sampler.width
        )
        return DataPayload(tuple(captions), self.policy.codec.encode(pixels))

    def _score(self, prompts: list[str], latents: list[torch.Tensor]) -> list[ItemScore | ScoreFailure]:
        images = [Media.image(image) for image in self.policy.codec.decode(torch.stack(latents))]
        asked = [p for p in prompts for _ in range(self.config.rollout.group_size)]
        n, count = len(images), len(self.scorers)
        parts = [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
        jobs = [self.pool.submit(scorer.score, asked[part], images[part]) for scorer, part in zip(self.scorers, parts, strict=True)]
        return [score for job in jobs for score in job.result()]


def main() -> None:
    recipe, updates, file, *overrides = sys.argv[1:]
    config = load_config(Path(recipe), [f"updates={updates}", *(value for value in overrides if value != "--set")])
    loop = BareLoop(config, len(os.sched_getaffinity(0)))
    with Path(file).open("w") as out:
        for step in range(1, config.updates + 1):
            out.write(json.dumps(loop.update(step)) + "\n")
            out.flush()


if __name__ == "__main__":
    main()
