"""The rollout generator: lease groups → sample them in the engine → score each that is done (while others are sampled) → commit it.

Complete after `__init__` and driven by the ledger alone, so a generator that dies is simply started again: its leases
expire and are given to someone else. Every group is a function of (run seed, group, weights): prompt, noise and the
trained steps are drawn from named generators.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis
import torch

from actors.config import PromptConfig, RolloutConfig
from actors.connect import Target
from actors.payload import GroupPayload, encode
from actors.sources.prompts import training_prompt
from actors.weights import pull
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.device import resolve_device
from diffusion.engine.aio import AsyncEngine
from diffusion.engine.cache import PromptCache
from diffusion.engine.decode import Decoder
from diffusion.engine.engine import Engine
from diffusion.engine.request import SampleRequest, Trajectory
from diffusion.engine.runner import compile_for_batches
from diffusion.families.conditioning import Conditioning
from diffusion.kernel_names import stochastic_steps
from diffusion.seeds import key
from replay.buffer import Lease
from replay.errors import ReplayError
from services.client.base import ItemScore, ScoreFailure
from services.client.connect import connect
from services.config import RewardConfig

IDLE_S = 1.0
"""Longest a generator waits for a lease before it looks at its stop flag."""
DECODE_DEADLINE_S = 300.0
LOOK_S = 0.1
"""How often a generator that samples and has room for more asks for another lease."""


@dataclass(frozen=True)
class RolloutSpec:
    """Everything a generator needs; plain settings that pickle."""

    seed: int
    model: ModelConfig
    sampler: SamplerConfig
    rollout: RolloutConfig
    prompts: PromptConfig
    target: Target
    reward: RewardConfig


class ScoringFailed(Exception):
    """Too few members of a group have a score; the message says which have none and why."""


class LineageChanged(Exception):
    """A group that was sampled by weights of two histories; it is made again."""


def scored_members(scores: Sequence[ItemScore | ScoreFailure], enough: int) -> tuple[list[int], list[float]]:
    """Members that have a reward, and the rewards. A member without one is left out of the group, never given a number.

    The group is then normalised by the statistics of those that are left. Raises ScoringFailed when fewer than `enough` are.
    """
    scored = [(member, score.reward) for member, score in enumerate(scores) if isinstance(score, ItemScore)]
    if len(scored) < enough:
        failed = [f"member {member}: {s.code}: {s.message}" for member, s in enumerate(scores) if not isinstance(s, ItemScore)]
        raise ScoringFailed(f"{len(scored)} of {len(scores)} members have a reward, {enough} are needed; " + "; ".join(failed[:3]))
    return [member for member, _ in scored], [reward for _, reward in scored]


def trained_steps(sampler: SamplerConfig, seed: int, group: int) -> tuple[int, ...]:
    """Trained step indices of a group, ascending: one choice per group, so that its members stay comparable."""
    if isinstance(sampler.trained_steps, list):
        return tuple(sorted(sampler.trained_steps))
    rng = np.random.default_rng(key(seed, "trained", group))
    drawn = rng.choice(stochastic_steps(sampler.kernel, sampler.steps), sampler.trained_steps, replace=False)
    return tuple(sorted(int(i) for i in drawn))


def group_request(
    sampler: SamplerConfig, rollout: RolloutConfig, seed: int, group: int, text: Conditioning, negative: Conditioning | None, shape: tuple[int, ...]
) -> SampleRequest:
    """The request for all members of one group. `negative`: the encoded negative prompt, with guidance."""
    trained = trained_steps(sampler, seed, group)
    stochastic = range(stochastic_steps(sampler.kernel, sampler.steps)) if sampler.noise_on == "all" else trained
    return SampleRequest(
        shape=shape,
        steps=sampler.steps,
        conditioning=text,
        n=rollout.group_size,
        seed=seed,
        group=group,
        kernel=sampler.kernel,
        noise_level=sampler.noise_level,
        stochastic=frozenset(stochastic),
        trained=trained,
        same_start=rollout.same_initial_noise,
        guidance=sampler.guidance,
        negative=negative,
        id=group,
    )


def group_payload(trajectories: Sequence[Trajectory], text: Conditioning) -> GroupPayload:
    """Stack the members' trained transitions."""
    previous = [t.previous for t in trajectories if t.previous is not None]
    return GroupPayload(
        x=torch.stack([t.x for t in trajectories]),
        x_next=torch.stack([t.x_next for t in trajectories]),
        log_prob=torch.stack([t.log_prob for t in trajectories]),
        trained=torch.tensor(trajectories[0].request.trained),
        times=trajectories[0].times,
        prompt_embeds=text.prompt_embeds.cpu(),
        pooled=text.pooled.cpu(),
        previous=torch.stack(previous) if previous else None,
    )


@dataclass
class _Group:
    """A group in the engine."""

    lease: Lease
    prompt: str
    text: Conditioning
    lineage: int
    started: float
    mixed: bool = False  # whether weights of another lineage may have taken part


class RolloutGenerator:
    """Plain class; the driver makes it a Ray actor.

    Args:
        spec: settings.
        weights: handle of the WeightStore actor.
        index: number of this generator, for lease ownership and logs.
    """

    def __init__(self, spec: RolloutSpec, weights: Any, index: int) -> None:
        torch.set_num_threads(spec.rollout.threads)
        self.spec, self.weights, self.owner = spec, weights, f"generator-{index}"
        device = resolve_device("cuda" if spec.rollout.gpus > 0 else "cpu", f"rollout.gpus={spec.rollout.gpus:g}")
        self.policy = load_policy(spec.model, device, spec.seed)
        sampler = spec.sampler
        self.shape = (self.policy.codec.channels, *self.policy.codec.latent_size(sampler.height, sampler.width))
        merge = spec.model.lora.rank > 0 and spec.model.lora.merge
        engine = Engine(self.policy.transformer, self.policy.process, sampler.max_tokens, spec.model.dtype, merge=merge)
        self.text = PromptCache(self.policy.text_encoder, device)
        if spec.model.compile:
            compile_for_batches(self.policy.transformer)
        self._description = {
            "kind": "engine",
            "step": 0,
            "generator": self.owner,
            "budget": str(engine.runner.plan),
            "network": engine.runner.describe(),
            "attention": self.policy.attention.why,
        }
        self.engine = AsyncEngine(engine)
        self.decoder = Decoder(self.policy.codec, device)
        self.held: tuple[int, int] | None = None  # (lineage, version) of the newest weights that the engine was given
        self.buffer = spec.target.buffer()
        self.client = connect(spec.reward)
        self._stop = threading.Event()
        self._scorer = ThreadPoolExecutor(1, "scorer")
        self._leases: dict[int, Lease] = {}
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()

    def pid(self) -> int:
        """Process id, so that an operator can find (or a fault test can kill) it."""
        return os.getpid()

    def describe(self) -> dict[str, Any]:
        """How this generator samples, as a line of metrics.jsonl: token budget, attention provider, precision."""
        return self._description

    def stop(self) -> None:
        """Finish the groups in hand and return from `run`."""
        self._stop.set()

    def run(self) -> int:
        """Generate until stopped; returns how many groups were committed."""
        self.buffer.release(self.owner)  # what a former self of this actor held
        committed = 0
        sampling: dict[Future[list[Trajectory]], _Group] = {}
        scoring: deque[Future[bool]] = deque()
        while sampling or not self._stop.is_set():
            while len(sampling) < self.spec.rollout.concurrent_groups and not self._stop.is_set():
                lease = self.buffer.lease(self.owner, 0.0 if sampling else IDLE_S)
                if lease is None:
                    break
                begun = self._begin(lease)
                if begun is not None:
                    sampling[begun[0]] = begun[1]
            room = len(sampling) < self.spec.rollout.concurrent_groups
            for future in wait(sampling, LOOK_S if room else IDLE_S, FIRST_COMPLETED).done:
                if len(scoring) == self.spec.rollout.concurrent_groups:  # scoring falls behind: sampling waits for it
                    committed += scoring.popleft().result()
                group = sampling.pop(future)
                group.mixed = self.spec.rollout.weights == "in_flight" and self.held is not None and self.held[0] != group.lineage
                scoring.append(self._scorer.submit(self._score_and_commit, group, future, time.monotonic() - group.started))
        return committed + sum(f.result() for f in scoring)

    def _begin(self, lease: Lease) -> tuple[Future[list[Trajectory]], _Group] | None:
        """Hand a leased group to the engine; None if that failed, and the lease is given back with the reason."""
        self._leases[lease.group] = lease
        try:
            self._refresh(lease.min_version)
            assert self.held is not None  # _refresh returned
            sampler = self.spec.sampler
            prompt = training_prompt(self.spec.prompts, self.spec.seed, lease.group)
            text = self.text.get([prompt])[0]
            negative = self.text.get([sampler.negative_prompt])[0] if sampler.guidance != 1 else None
            request = group_request(sampler, self.spec.rollout, self.spec.seed, lease.group, text, negative, self.shape)
            group = _Group(lease, prompt, text, self.held[0], time.monotonic())
            return self.engine.submit(request), group
        except Exception as error:  # the group goes back with its reason; the ledger counts attempts
            self._give_back(lease, "sampling", error)
            return None

    def _give_back(self, lease: Lease, stage: str, error: Exception) -> None:
        self._leases.pop(lease.group, None)  # first: once it is given back it may come again, as another lease
        self.buffer.fail(lease, _reason(stage, error))

    def _heartbeat(self) -> None:
        """Keep the leases in hand alive, however long sampling and scoring take; ends with the process."""
        while True:
            time.sleep(self.spec.target.settings.lease_s / 3)
            for lease in list(self._leases.values()):
                with contextlib.suppress(redis.RedisError, ReplayError):  # the next beat tries again; the lease outlives two misses
                    self.buffer.extend(lease)

    def _refresh(self, least: int) -> None:
        """Give the engine the newest weights; wait until they are at least version `least`."""
        deadline = time.monotonic() + self.spec.target.wait_s
        while True:
            fresh = pull(self.weights, self.held, self.spec.target.wait_s)
            if fresh is not None:
                swap = self.engine.set_weights(fresh.state(), fresh.version, fresh.sha256, self.spec.rollout.weights)
                swap.result(self.spec.target.wait_s)
                self.held = fresh.name
            if self.held is not None and self.held[1] >= least:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"weights of version {least} did not appear within {self.spec.target.wait_s:.0f} s; newest is {self.held}")
            time.sleep(0.05)

    def _score_and_commit(self, group: _Group, sampled: Future[list[Trajectory]], sampling_s: float) -> bool:
        lease, stage, start = group.lease, "sampling", time.monotonic()
        try:
            trajectories = sampled.result()
            if group.mixed:
                raise LineageChanged("the learner went back to a checkpoint while the group was sampled")
            stage = "decoding"
            images = np.stack(self.decoder.decode([t.latent for t in trajectories], DECODE_DEADLINE_S))
            stage, reward = "scoring", self.spec.reward
            scores = self.client.score(reward.model, [group.prompt] * len(images), images, reward.timeout_s)
            members, rewards = scored_members(scores, self.spec.rollout.enough_members)
            meta: dict[str, float | int | str] = {"prompt": group.prompt, "sample_s": sampling_s, "score_s": time.monotonic() - start, "generator": self.owner}
            if len(members) < len(trajectories):
                meta["failed_members"] = len(trajectories) - len(members)
            payload = encode(group_payload([trajectories[member] for member in members], group.text))
            version = min(t.version for t in trajectories)
            committed = self.buffer.commit(lease, payload, rewards, version, meta, group.lineage, self.spec.target.wait_s)
        except Exception as error:
            self._give_back(lease, stage, error)
            return False
        self._leases.pop(lease.group, None)
        return committed


def _reason(stage: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({last.name})" if last else ""
    return f"{stage}: {type(error).__name__}: {error}{where}"[:500]
