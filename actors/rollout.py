"""The rollout generator: hold weights → lease groups → sample them in the engine → score each that is done (while others are sampled) → commit it.

Evaluations are its work too, at low priority: samples and losses of a named version, in the same engine (`actors.held_out`), whether it
runs or not.

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
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import redis
import torch
from numpy.typing import NDArray

from actors.conditioning import Conditioner, Subject, Subjects
from actors.config import DataConfig, PromptConfig, RolloutConfig
from actors.connect import Target
from actors.encoding import EncoderUnavailable
from actors.groups import fps_of, group_payload, group_request, judge
from actors.held_out import HeldOut
from actors.payload import encode
from actors.ranks import GeneratorRanks
from actors.rewards import RunRewards
from actors.sources.example import Example
from actors.sources.latents import clean_latents
from actors.weights.reading import Exported, pull
from actors.weights.store import View
from actors.weights.transport import WeightsDamaged, WeightsGone
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from diffusion.device import resolve_device
from diffusion.engine.aio import AsyncEngine
from diffusion.engine.cache import PromptCache
from diffusion.engine.decode import Decoder
from diffusion.engine.engine import Engine
from diffusion.engine.request import Trajectory
from diffusion.engine.runner import compile_for_batches
from diffusion.families.conditioning import TextEncoder
from diffusion.families.frames import FrameEncoder
from replay.buffer import Lease
from replay.errors import ReplayError
from services.client.base import RewardUnavailable
from services.contract import ItemScore, ScoreFailure

IDLE_S = 1.0
"""Longest a generator waits for a lease before it looks at its stop flag."""
DECODE_DEADLINE_S = 300.0
LOOK_S = 0.1
"""How often a generator that samples and has room for more asks for another lease."""


@dataclass(frozen=True)
class RolloutSpec:
    """Everything a generator needs; plain settings that pickle.

    Attributes:
        own_data: each group brings its example's own datum.
        samples: of a rollout the sample alone is stored, and no transitions.
        store_dtype: type that states are stored in.
        encoder, frames: of its prompts, and of frames that are given; None = the policy's own, loaded here.
    """

    seed: int
    model: ModelConfig
    sampler: SamplerConfig
    rollout: RolloutConfig
    prompts: PromptConfig
    data: DataConfig
    target: Target
    rewards: RunRewards
    own_data: bool = False
    samples: bool = False
    store_dtype: str = "float32"
    encoder: TextEncoder | None = None
    frames: FrameEncoder | None = None


class LineageChanged(Exception):
    """A group that was sampled by weights of two histories; it is made again."""


class WeightsMissing(Exception):
    """The weights that a lease asks for did not appear in time."""


INFRASTRUCTURE = (LineageChanged, WeightsMissing, RewardUnavailable, EncoderUnavailable)
"""Reasons that say nothing against a group: they cost it no attempt."""


@dataclass
class _Group:
    """A group in the engine."""

    lease: Lease
    subject: Subject
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
        ranks = GeneratorRanks(spec, device.type) if spec.rollout.sequence_ranks > 1 else None  # they load while this one does
        self.policy = load_policy(spec.model, device, spec.seed, spec.encoder)
        sampler = spec.sampler
        self.shape = self.policy.codec.latent_shape(sampler.height, sampler.width, sampler.frames)
        self.subjects = Subjects(spec.seed, spec.prompts, spec.data, sampler)
        merge = spec.model.lora.rank > 0 and spec.model.lora.merge
        tokens = sampler.max_tokens if ranks is None else min(sampler.max_tokens, ranks.join(self.policy.transformer))
        engine = Engine(self.policy.transformer, self.policy.process, tokens, spec.model.dtype, merge=merge, side=True, followers=ranks)
        self.text = PromptCache(self.policy.text_encoder, device)
        picture = self.policy.transformer.needs_picture
        self.conditioner = Conditioner(self.text, spec.frames or self.policy.frames, self.policy.codec, sampler, picture)
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
        self._held_out = HeldOut(spec, self.engine, self.policy, self.conditioner, self.decoder, engine.runner.plan.tokens, ranks)
        self.held: tuple[int, int] | None = None  # (lineage, version) of the newest weights that the engine was given
        self._ranks = ranks
        self.buffer = spec.target.buffer()
        self.client = spec.rewards.connect()
        self.revisions: dict[str, str] = {}  # of the trained rewards, asked for before the first group is scored
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
        if not self._first_weights():
            return 0
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

    def sample_held_out(self, weights: View | Exported | None, draw: str, examples: list[Example], first: int, repeats: int) -> NDArray[np.uint8]:
        """See `HeldOut.sample`."""
        return self._held_out.sample(weights, draw, examples, first, repeats)

    def held_out_losses(self, weights: View | Exported | None, split: str, points: int, first: int, count: int) -> list[tuple[float, float]]:
        """See `HeldOut.losses`."""
        return self._held_out.losses(weights, split, points, first, count)

    def _begin(self, lease: Lease) -> tuple[Future[list[Trajectory]], _Group] | None:
        """Hand a leased group to the engine; None if that failed, and the lease is given back with the reason."""
        self._leases[lease.group] = lease
        try:
            self._refresh(lease.min_version)
            assert self.held is not None  # _refresh returned
            sampler = self.spec.sampler
            subject = self.subjects.group(lease.group)
            if subject.given:  # of the latent that the group brings, so that a rank finds the same frames in it
                subject = replace(subject, x0=self._own_datum(subject))
            guided = [replace(subject, text=sampler.negative_prompt)] if sampler.guidance != 1 else []
            shown, *negative = self.conditioner.get([subject, *guided])
            shape = self.policy.transformer.free_shape(self.shape, subject.given)
            request = group_request(
                sampler, self.spec.rollout, self.spec.seed, lease.group, shown, next(iter(negative), None), shape, self.spec.store_dtype, self.spec.samples
            )
            group = _Group(lease, subject, self.held[0], time.monotonic())
            return self.engine.submit(request), group
        except Exception as error:  # the group goes back with its reason; the ledger counts attempts
            self._give_back(lease, "sampling", error)
            return None

    def _give_back(self, lease: Lease, stage: str, error: Exception, prompt: str = "") -> None:
        """Hand a group back: one that failed has used an attempt, one that lacked weights or a reward service has not."""
        self._leases.pop(lease.group, None)  # first: once it is given back it may come again, as another lease
        if isinstance(error, INFRASTRUCTURE):
            self.buffer.give_back(lease, _reason(stage, error))
        else:
            self.buffer.fail(lease, _reason(stage, error), prompt)

    def _heartbeat(self) -> None:
        """Keep the leases in hand alive, however long sampling and scoring take; ends with the process."""
        while True:
            time.sleep(self.spec.target.settings.lease_s / 3)
            for lease in list(self._leases.values()):
                with contextlib.suppress(redis.RedisError, ReplayError):  # the next beat tries again; the lease outlives two misses
                    self.buffer.extend(lease)

    def _first_weights(self) -> bool:
        """Wait until there are weights to sample with: a lease is taken only then. False when stopped before."""
        while self.held is None and not self._stop.is_set():
            with contextlib.suppress(WeightsMissing):
                self._refresh(0, IDLE_S)
        return self.held is not None

    def _refresh(self, least: int, wait_s: float | None = None) -> None:
        """Give the engine the newest weights; wait until they are at least version `least`. Weights that cannot be read change nothing."""
        wait_s = self.spec.target.wait_s if wait_s is None else wait_s
        deadline = time.monotonic() + wait_s
        trouble = ""
        while True:
            try:
                self._take_newest()
            except (WeightsGone, WeightsDamaged) as error:
                trouble = f"; {error}"
            if self.held is not None and self.held[1] >= least:
                return
            if time.monotonic() > deadline:
                raise WeightsMissing(f"weights of version {least} did not appear within {wait_s:.0f} s; newest is {self.held}{trouble}")
            time.sleep(0.05)

    def _take_newest(self) -> None:
        """Swap to the newest weights, unless the engine has them. Raises WeightsGone, WeightsDamaged; the store is told."""
        wait_s = self.spec.target.wait_s
        view = pull(self.weights, self.held, wait_s)
        if view is None:
            return
        try:
            if self._ranks is not None:
                self._ranks.hold(False, view, view.table.version, view.table.digest, wait_s)
            fresh = view.open(wait_s)
        except (WeightsGone, WeightsDamaged) as error:
            self.weights.lost.remote(view.table.name, str(error))
            raise
        self.engine.set_weights(fresh, fresh.version, fresh.digest, self.spec.rollout.weights).result(wait_s)
        self.held = fresh.name

    def _score_and_commit(self, group: _Group, sampled: Future[list[Trajectory]], sampling_s: float) -> bool:
        lease, stage, start, text = group.lease, "sampling", time.monotonic(), group.subject.text
        rewards, rollout = self.spec.rewards, self.spec.rollout
        try:
            trajectories = sampled.result()
            if group.mixed:
                raise LineageChanged("the learner went back to a checkpoint while the group was sampled")
            stage, sampler, names, scores = "scoring", self.spec.sampler, rewards.trained_names, dict[str, list[ItemScore | ScoreFailure]]()
            if not self.revisions:
                self.revisions = {name: info.revision for name, info in self.client.info(names).items()}
            stage = "decoding"
            for images in self.decoder.turns([t.whole for t in trajectories], sampler.pixel_bytes, DECODE_DEADLINE_S):
                stage = "scoring"
                for name, found in self.client.score_all(names, [text] * len(images), images, rewards.fleet.timeout_s, fps_of(images, sampler)).items():
                    scores.setdefault(name, []).extend(found)
                del images  # before the next is waited for
                stage = "decoding"
            stage = "scoring"
            judged = judge(scores, rewards.trained, len(trajectories), rollout.enough_members, rewards.fill_mean)
            meta: dict[str, float | int | str] = {"prompt": text, "sample_s": sampling_s, "score_s": time.monotonic() - start, "generator": self.owner}
            if judged.failures:
                meta["failed_members"] = len(trajectories) - len(judged.members)
                meta["failed_scores"] = judged.failures
            kept = [trajectories[member] for member in judged.members]
            payload = encode(group_payload(kept, text, self._own_datum(group.subject)), getattr(torch, self.spec.store_dtype))
            version = min(t.version for t in trajectories)
            committed = self.buffer.commit(
                lease, payload, judged.totals, version, meta, group.lineage, self.spec.target.wait_s, scores=judged.values, revisions=self.revisions
            )
        except Exception as error:
            self._give_back(lease, stage, error, text)
            return False
        self._leases.pop(lease.group, None)
        return committed

    def _own_datum(self, subject: Subject) -> torch.Tensor | None:
        """Clean latent of a group's own example, where that is its anchor datum."""
        if not self.spec.own_data or subject.example is None or subject.x0 is not None:
            return subject.x0
        sampler = self.spec.sampler
        return clean_latents([subject.example], self.policy.codec, sampler.height, sampler.width, sampler.frames)[0]


def _reason(stage: str, error: Exception) -> str:
    last = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    where = f" ({last.name})" if last else ""
    return f"{stage}: {type(error).__name__}: {error}{where}"[:500]
