"""Sample, score, learn, one after the other, in one process: what `ddrl doctor` tries a recipe with, and benchmarks hold the pipeline against.

The same groups (prompts, noise, trained steps), engine, scorers, objective and optimiser as a run's. The engine samples with the learner's own
module, so no weights are copied. Frames that a rollout is given, and rewards of another service, are not for it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch

from actors.groups import Judged, fps_of, group_payload, group_request, judge
from actors.payload import DataPayload, encode
from actors.sources.draws import data_source, prompt_source, training_batch, training_example
from diffusion.checkpoint import Policy, load_policy
from diffusion.device import resolve_device
from diffusion.engine.engine import Engine
from diffusion.engine.request import Trajectory
from diffusion.families.base import PackedModel
from replay.buffer import ReplayBuffer
from replay.records import Claim, ClaimedData, ClaimedGroup, GroupHeader
from services.contract import ItemScore, ScoreFailure
from services.media.base import Media
from services.scorers.base import Scorer
from services.scorers.registry import build_scorer
from trainer.config.errors import ConfigError
from trainer.config.run import RunConfig
from trainer.learn.batch import StepBatch
from trainer.learn.learner import BY_STEP, SUMS, Learner
from trainer.run.rewards import run_rewards

Scores = dict[str, list[ItemScore | ScoreFailure]]


class SoloLearner(Learner):
    """The learner without its process group: the same losses, clipping, optimiser and averages on a plain module."""

    def _spread(self, model: PackedModel) -> None:
        """Nothing is sharded."""

    def _backward(self, losses: Sequence[Callable[[], torch.Tensor]]) -> None:
        for compute in losses:
            compute().backward()

    def _longest(self, tokens: int) -> tuple[int, bool]:
        return tokens, True

    def add_up(self, sums: torch.Tensor) -> None:
        """Nobody else has rows."""

    def sums(self) -> torch.Tensor:
        """Zeros, for what an update adds up."""
        return torch.zeros(len(SUMS) + len(BY_STEP) * self.kernel.steps, dtype=torch.float64, device=self.device)


class Held:
    """Payloads in this process: what `step_batches` reads."""

    def __init__(self) -> None:
        self.payloads: dict[str, list[bytearray]] = {}

    def read(self, entry: ClaimedGroup | ClaimedData, segments: Sequence[int]) -> list[bytearray]:
        return [self.payloads[entry.ref][i] for i in segments]


@dataclass(frozen=True)
class Round:
    """Groups that were sampled and scored, and the seconds that both took."""

    groups: list[int]
    prompts: list[str]
    trajectories: list[list[Trajectory]]
    judged: list[Judged]
    seconds: tuple[float, float]


class SoloLoop:
    """One run of a recipe in one process.

    Args:
        config: the run.
        threads: torch threads, and scorers of each reward.
    Raises:
        ConfigError: a recipe that this loop is not for, with the reason.
    """

    def __init__(self, config: RunConfig, threads: int) -> None:
        if config.sampler.given_choices != (0,):
            raise ConfigError("sampler.given_frames: rollouts that are given frames are not made in one process")
        if config.fleet.url is not None:
            raise ConfigError("fleet.url: rewards of another service are not asked for in one process")
        torch.set_num_threads(threads)
        self.config = config
        gpu = config.learner.gpus > 0 or config.rollout.gpus > 0
        device = resolve_device("cuda" if gpu else "cpu", "learner.gpus and rollout.gpus")
        self.policy: Policy = load_policy(config.model, device, config.seed)
        self.learner = SoloLearner(config, device)
        self.engine = self._engine()
        sampler = config.sampler
        self.shape = self.policy.codec.latent_shape(sampler.height, sampler.width, sampler.frames)
        self.rewards = run_rewards(config)
        self.scorers: dict[str, list[Scorer]] = {
            name: [build_scorer(self.rewards.fleet.rewards[name]) for _ in range(threads)] for name in self.rewards.trained_names
        }
        self.prompts, self.data = prompt_source(config.prompts, config.data), data_source(config.data)
        self.pool = ThreadPoolExecutor(threads, "scorer")

    def _engine(self) -> Engine:
        return Engine(self.learner.model, self.policy.process, self.config.sampler.max_tokens, self.config.model.dtype)

    def groups_of(self, step: int) -> range:
        """Numbers of the groups of update `step`."""
        count = self.config.rollout.groups_per_step
        return range((step - 1) * count, step * count)

    def round(self, groups: Sequence[int], text: str | None = None) -> Round:
        """Sample and score these groups. `text`: the prompt of all of them, instead of their own."""
        config, clock = self.config, [time.monotonic()]
        prompts = [text or training_example(self.prompts, config.seed, g).text for g in groups]
        shown = self.policy.text_encoder.encode(prompts)
        negative = self.learner.guidance.negative if self.learner.guidance else None
        sampler, rollout, o = config.sampler, config.rollout, config.objective
        requests = [
            group_request(sampler, rollout, config.seed, g, shown[i], negative, self.shape, config.replay.store_dtype, o.on_samples)
            for i, g in enumerate(groups)
        ]
        with self.learner.as_old() if self.learner.old and o.policy_loss == "nft" else nullcontext():
            done = self.engine.run(requests)
        self.learner.model.train()
        clock.append(time.monotonic())
        size = rollout.group_size
        trajectories = [done[i * size : (i + 1) * size] for i in range(len(groups))]
        scores = self._score(prompts, [t.whole for t in done])
        judged = []
        for i in range(len(groups)):
            mine = {name: found[i * size : (i + 1) * size] for name, found in scores.items()}
            judged.append(judge(mine, self.rewards.trained, size, rollout.enough_members, self.rewards.fill_mean))
        clock.append(time.monotonic())
        sampled, scored = (b - a for a, b in itertools.pairwise(clock))
        return Round(list(groups), prompts, trajectories, judged, (sampled, scored))

    def batches(self, step: int, made: Round) -> list[StepBatch]:
        """What update `step` learns from: these groups, through the wire format, and its own batch of anchor data."""
        config, held, claimed = self.config, Held(), []
        for g, prompt, members, judged in zip(made.groups, made.prompts, made.trajectories, made.judged, strict=True):
            kept = [members[m] for m in judged.members]
            held.payloads[str(g)] = list(encode(group_payload(kept, prompt), getattr(torch, config.replay.store_dtype)))
            header = GroupHeader(judged.totals, len(kept), step - 1, sum(map(len, held.payloads[str(g)])), "", scores=judged.values)
            claimed.append(ClaimedGroup(g, header, str(g)))
        data = []
        if config.uses_data:
            held.payloads["data"] = list(encode(self._anchors(step - 1)))
            data = [ClaimedData(step - 1, "data", "")]
        return self.learner.batches(cast(ReplayBuffer, held), Claim(step, 0, claimed, data), 0, 1)

    def update(self, step: int) -> dict[str, Any]:
        """Update `step`: its groups and data batch, made and learnt from; a line like that of metrics.jsonl."""
        groups = self.groups_of(step)
        made = self.round(groups)
        clock = [time.monotonic()]
        batches = self.batches(step, made)
        clock.append(time.monotonic())
        stats = self.learner.update(batches, step)
        clock.append(time.monotonic())
        taken = (*made.seconds, *(b - a for a, b in itertools.pairwise(clock)))
        rewards = [total for judged in made.judged for total in judged.totals]
        record = {"kind": "update", "time": time.time(), "step": step, "trained_groups": list(groups), "failed_members": 0}
        seconds = dict(zip(("sample", "score", "batch", "train"), taken, strict=True))
        return record | {"seconds": seconds, "reward_mean": sum(rewards) / len(rewards)} | stats

    def _anchors(self, batch: int) -> DataPayload:
        """Anchor batch `batch`, as the feeder makes it."""
        config = self.config
        captions, pixels = training_batch(
            self.data, config.data.caption_dropout, config.seed, batch, config.data_rows, config.sampler.height, config.sampler.width
        )
        return DataPayload(tuple(captions), self.policy.codec.encode(pixels).cpu())

    def _score(self, prompts: list[str], latents: list[torch.Tensor]) -> Scores:
        pixels = self.policy.codec.decode(torch.stack(latents))
        fps = fps_of(pixels, self.config.sampler)
        images = [Media.image(image) if fps is None else Media(image, fps) for image in pixels]
        asked = [p for p in prompts for _ in range(self.config.rollout.group_size)]
        found: Scores = {}
        for name, scorers in self.scorers.items():
            n, count = len(images), len(scorers)
            parts = [slice(n * i // count, n * (i + 1) // count) for i in range(count)]
            jobs = [self.pool.submit(scorer.score, asked[part], images[part]) for scorer, part in zip(scorers, parts, strict=True)]
            found[name] = [score for job in jobs for score in job.result()]
        return found
