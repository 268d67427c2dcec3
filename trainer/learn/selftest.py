"""The log-probability self-test: before the first claim, does the learner find the densities that the sampling engine stores?

Every rank, or group of ranks that share their tokens, samples a few rollouts with the run's own settings, in packed batches of two
sizes where the model allows, sends them through the wire format, and replays their trained transitions as the learner does. The
weights are the same on both sides, so each ratio should be 1; how far it is from it is the noise that arithmetic alone (precision,
batch shapes, attention kernels) puts into the ratios of this run. A ratio that is clipped at 1 ± c means nothing when the noise is of
that size.

Engine and replay run on this rank's device: a difference between the generators' devices and the learner's shows in
`ratio_deviation` of the updates, not here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from actors.groups import group_payload, group_request
from actors.payload import decode_group, encode
from diffusion.engine.engine import Engine
from diffusion.engine.request import Failure, SampleRequest, SamplingFailed, Trajectory
from diffusion.seeds import key
from trainer.config.run import RunConfig
from trainer.learn.batch import take, transitions_of
from trainer.learn.learner import Learner
from trainer.learn.objective import Transitions, policy_terms
from trainer.learn.plan import slices

MEMBERS = 2
"""Rollouts of each size on each rank."""
SHARE = 0.1
"""Largest |ratio - 1| that is accepted, as a share of the clip."""
HEADROOM = 0.8
"""Share of the smallest memory of any rank that is used: all ranks must split their batches alike."""


@dataclass(frozen=True)
class SelfTest:
    """What was measured over all ranks; |ratio - 1| in the run's `objective.log_prob` scaling.

    Attributes:
        transitions: how many were replayed.
        largest, mean: of |ratio - 1|; `largest` is inf when one is no number.
        gap: largest difference of exact log-densities (mean over latent entries).
        by_step: mean |ratio - 1| by index of the trained step.
        seconds: wall clock.
    """

    transitions: int
    largest: float
    mean: float
    gap: float
    by_step: dict[int, float]
    seconds: float

    def refusal(self, config: RunConfig) -> str | None:
        """Why this run must not start as it is configured; None when it may."""
        objective, limit = config.objective, SHARE * config.objective.clip
        if objective.old_log_prob == "learner" or self.largest <= limit:
            return None
        return (
            f"the learner's log-probabilities differ from the sampler's: |ratio - 1| is up to {self.largest:.2g} before any update, "
            f"more than clip/10 = {limit:.2g} "
            f"(model.dtype={config.model.dtype}, guidance={config.sampler.guidance:g}, kernel={config.sampler.kernel}); "
            "set objective.old_log_prob=learner, or model.dtype=float32, or raise objective.clip"
        )

    def record(self, config: RunConfig, step: int) -> dict[str, Any]:
        """The line of metrics.jsonl; numbers that are not finite are left out."""
        numbers = {"ratio_deviation_max": self.largest, "ratio_deviation_mean": self.mean, "log_prob_gap_max": self.gap}
        return {
            "kind": "self_test",
            "step": step,
            "transitions": self.transitions,
            **{name: value for name, value in numbers.items() if math.isfinite(value)},
            "ratio_deviation_by_step": {str(i): value for i, value in self.by_step.items() if math.isfinite(value)},
            "limit": SHARE * config.objective.clip,
            "old_log_prob": config.objective.old_log_prob,
            "refused": self.refusal(config),
            "seconds": round(self.seconds, 3),
        }


def shapes_of(learner: Learner) -> list[tuple[int, ...]]:
    """Shape of what is sampled of group 0, and half its width where the model takes that and no frames of the whole width are given."""
    *rest, width = learner.shape
    if learner.subjects.given_to_group(0):
        return [learner.shape]
    half = (*rest, width // 2)
    try:
        learner.model.tokens(half)
    except ValueError:
        return [learner.shape]
    return [learner.shape, half]


def requests_of(learner: Learner, rank: int, members: int = MEMBERS) -> list[SampleRequest]:
    """A group of `members` of each shape. The rank names the noise alone: which steps are trained, and so how many forward
    passes there are, is the same on all ranks."""
    config = learner.config
    rollout = config.rollout.model_copy(update={"group_size": members})
    assert learner.probe is not None  # rollouts are trained
    negative = learner.probe.beside(learner.guidance.negative.tensors) if learner.guidance is not None else None
    seed = key(config.seed, "self-test")
    requests = [group_request(config.sampler, rollout, seed, 0, learner.probe, negative, shape, config.replay.store_dtype) for shape in shapes_of(learner)]
    return [replace(request, seed=key(config.seed, "self-test", rank)) for request in requests]


def sample(learner: Learner, requests: list[SampleRequest]) -> list[Trajectory]:
    """Trajectories from the engine on this rank's shards; collective, and the same number of forward passes everywhere.

    Raises:
        SamplingFailed: on every rank alike, when a sample of any rank failed.
    """
    config = learner.config
    engine = Engine(learner.model, learner.process, config.sampler.max_tokens, config.model.dtype)
    fitting = torch.tensor([engine.runner.plan.fitting], device=learner.device)
    dist.all_reduce(fitting, dist.ReduceOp.MIN)
    engine = Engine(learner.model, learner.process, min(config.sampler.max_tokens, max(1, int(HEADROOM * int(fitting)))), config.model.dtype)
    failed: SamplingFailed | None = None
    try:
        trajectories = engine.run(requests)
    except SamplingFailed as error:
        failed, trajectories = error, error.trajectories
    finally:
        learner.model.train()
    failures = torch.tensor([0 if failed is None else len(failed.failures)], device=learner.device)
    dist.all_reduce(failures)
    if failed is not None:
        raise failed
    if int(failures):
        raise SamplingFailed([Failure(requests[0], 0, f"{int(failures)} samples failed on other ranks")], trajectories)
    return trajectories


def replayed(learner: Learner, requests: list[SampleRequest], trajectories: list[Trajectory]) -> Iterator[tuple[Transitions, dict[str, Tensor]]]:
    """Micro-batches of the trained transitions, through the wire format and the learner's own forward, and their statistics."""
    assert learner.probe is not None
    for request in requests:
        members = [t for t in trajectories if t.request is request]
        payload = decode_group(encode(group_payload(members, ""), getattr(torch, learner.config.replay.store_dtype)))
        rows = transitions_of(payload, [0.0] * len(members), learner.kernel)
        count = len(rows.x)
        for part in slices(count, -(-count // learner.rows_of_pass(rows, learner.probe))):
            taken = take(rows, part, learner.device)
            prediction = learner.replay(taken, learner.probe.expand(len(taken.x)).to(learner.device)).detach()
            yield taken, policy_terms(prediction, None, taken, learner.kernel, learner.config.objective)[1]


def self_test(learner: Learner, members: int = MEMBERS) -> SelfTest:
    """Sample `members` rollouts of each size on each rank, replay, compare; collective. The learner is left as it was."""
    started, device, steps = time.monotonic(), learner.device, learner.kernel.steps
    requests = requests_of(learner, learner.mesh.data_rank, members)
    largest = torch.zeros(2, dtype=torch.float64, device=device)
    sums = torch.zeros(2, steps, dtype=torch.float64, device=device)
    for rows, stats in replayed(learner, requests, sample(learner, requests)):
        deviation, gap = (stats[name].double().nan_to_num(nan=math.inf) for name in ("ratio_deviation_rows", "log_prob_gap_rows"))
        largest = torch.maximum(largest, torch.stack([deviation.max(), gap.max()]))
        sums[0].index_add_(0, rows.step, torch.ones_like(deviation))
        sums[1].index_add_(0, rows.step, deviation)
    for module in learner.model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()  # the last forward was followed by no backward, which would have done it
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    learner.add_up(sums)
    count, total = sums
    by_step = {i: float(total[i] / count[i]) for i in range(steps) if count[i]}
    return SelfTest(int(count.sum()), float(largest[0]), float(total.sum() / count.sum()), float(largest[1]), by_step, time.monotonic() - started)
