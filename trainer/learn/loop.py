"""The training loop of one learner rank, run by Ray Train: self-test, then claim → update → publish → (every few steps) checkpoint.

Truth lies outside: the ledger says which groups a step has, the last registered checkpoint says which step to start
from. A checkpoint carries the ids claimed since the one before it, so a restart can settle them even if the ledger
forgot. It is written and reported in the background while updates go on (`trainer.learn.checkpoint`); that it was taken does not
mean that it is registered: settling is the controller's business (`trainer.learn.settle`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import ray
import ray.train
import torch

from actors.encoding import SharedFrames, SharedTextEncoder
from actors.weights.shards import hand_in
from diffusion.allocator import give_back_freed_memory, keep_freed_memory
from diffusion.device import resolve_device
from replay.buffer import Claim, ReplayBuffer
from replay.errors import ClaimTimeout
from trainer.config.run import RunConfig
from trainer.learn.checkpoint import Checkpoints, Progress, await_all, from_rank_zero, remove_unregistered, restore
from trainer.learn.entry import LoopSpec
from trainer.learn.exports import Exports
from trainer.learn.learner import Learner
from trainer.learn.metrics import ClaimMetrics
from trainer.learn.records import append_metrics, drop_metrics_after
from trainer.learn.selftest import self_test
from trainer.learn.update_line import Warnings, update_record

PUBLISH_DEADLINE_S = 60.0
STORE_DEADLINE_S = 5.0
"""For the weight store to say whether the version in place can be read; no answer says nothing."""
START_DEADLINE_S = 1800.0
"""For the reward fleet, whose models may have to be loaded over a network."""
START_POLL_S = 0.1
CLAIM_SLICE_S = 2.0
WAITING, CLAIMED, STOPPED, LOST = range(4)


def run(spec: LoopSpec) -> None:
    """The whole life of a rank."""
    config, run_dir = spec.config, Path(spec.run_dir)
    torch.set_num_threads(config.learner.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    saved = Path(context.get_storage().experiment_fs_path)
    device = resolve_device("cuda" if config.learner.gpus > 0 else "cpu", f"learner.gpus={config.learner.gpus:g}", context.get_local_rank())
    buffer = spec.target.buffer()
    if device.type == "cpu":
        keep_freed_memory()
    learner = Learner(config, device, *((SharedTextEncoder(spec.encoders), SharedFrames(spec.encoders)) if spec.encoders else ()))

    progress = restore(learner)
    await_start(buffer)  # every rank by itself: a collective has a deadline of its own
    epoch = buffer.rollback(progress.step, progress.groups, progress.data) if rank == 0 else 0
    progress.epoch, progress.groups, progress.data = from_rank_zero(epoch, device), [], []
    if rank == 0:
        drop_metrics_after(run_dir, progress.step)
        remove_unregistered(saved, progress.step)
        append_metrics(run_dir, learner.describe(progress.step))
    publishing = partial(publish, spec, buffer, learner, progress, rank, world)
    publishing()
    densities = config.uses_policy and not config.objective.on_samples
    if densities and progress.step < config.updates and not passes_self_test(learner, progress.step, run_dir if rank == 0 else None):
        return
    give_back_freed_memory()  # what loading and the self-test took
    exports = Exports(run_dir / "exports", config.model, rank)
    exports.take_missing(learner, progress.step)
    checkpoints = Checkpoints(saved, rank, config.learner.checkpoint_async)

    skipped, claims, warnings = 0, ClaimMetrics(config.name), Warnings()
    while progress.step < config.updates:
        step, started = progress.step + 1, time.monotonic()
        readable = partial(can_be_read, spec, progress.epoch, progress.step)
        claim = next_claim(buffer, step, progress.epoch, config.replay.claim_timeout_s, rank, device, readable, publishing)
        if claim is None:
            break
        claimed = time.monotonic()
        stats = learner.update(learner.batches(buffer, claim, learner.mesh.data_rank, learner.mesh.data_ranks), step)
        trained = time.monotonic()
        progress.step = step
        progress.groups.extend(g.group for g in claim.groups)
        progress.data.extend(d.batch for d in claim.data)
        if config.uses_policy or is_evaluated(config, step):
            publishing(wanted=is_evaluated(config, step))
        elif rank == 0:
            buffer.publish(step, progress.epoch)  # nobody samples from this version
        if rank == 0:
            seconds = {"wait": claimed - started, "train": trained - claimed, "publish": time.monotonic() - trained}
            claims.claimed(seconds["wait"], [step - 1 - g.header.version for g in claim.groups])
            told = warnings.new(config, stats)
            record = update_record(config, claim, stats, seconds) | ({"warnings": told} if told else {})
            append_metrics(run_dir, record | {"groups": _states(buffer)})
        skipped = skipped + 1 if stats["skipped"] else 0
        if skipped > config.learner.max_skipped:
            raise RuntimeError(f"gradients were not finite {skipped} updates in a row; lower optimizer.lr or sampler.noise_level")
        if step % config.checkpoint_every == 0:
            exports.take(learner, step)
            checkpoints.take(learner, progress)
    if progress.saved < progress.step:
        exports.take(learner, progress.step)
        checkpoints.take(learner, progress)
    checkpoints.finish()
    exports.finish()


def await_start(buffer: ReplayBuffer, deadline_s: float = START_DEADLINE_S) -> None:
    """Wait until training may start: the ranks come up while the reward fleet does, and nothing may be claimed before the buffer
    knows the fleet's revisions. Raises TimeoutError after `deadline_s`."""
    end = time.monotonic() + deadline_s
    while not buffer.may_start() and not buffer.stop_requested():
        if time.monotonic() > end:
            raise TimeoutError(f"the run's driver did not let training start within {deadline_s:.0f} s of the ranks being ready")
        time.sleep(START_POLL_S)


def next_claim(
    buffer: ReplayBuffer,
    step: int,
    epoch: int,
    timeout_s: float,
    rank: int,
    device: torch.device,
    readable: Callable[[], bool] = lambda: True,
    publishing: Callable[[], None] = lambda: None,
) -> Claim | None:
    """The claim of `step`, or None on every rank when the run was asked to stop, also while it waits for groups. Collective.

    Rank 0 waits, in slices far below the deadline of a collective, and tells the others; a claim is the same whoever asks.
    Groups may be late because the weights that they need are gone (with the store, or damaged): they are those in place, and while
    they are not `readable`, `publishing` hands them in again. Raises ClaimTimeout after `timeout_s`.
    """
    end = time.monotonic() + timeout_s
    while True:
        state = from_rank_zero(_look(buffer, step, epoch, end, readable) if rank == 0 else 0, device)
        if state == LOST:
            publishing()
        elif state != WAITING:
            return None if state == STOPPED else buffer.claim(step, epoch, timeout_s)


def _look(buffer: ReplayBuffer, step: int, epoch: int, end: float, readable: Callable[[], bool]) -> int:
    if buffer.stop_requested():
        return STOPPED
    left = end - time.monotonic()
    try:
        buffer.claim(step, epoch, max(0.0, min(CLAIM_SLICE_S, left)))
    except ClaimTimeout:
        if left <= CLAIM_SLICE_S:
            raise
        return WAITING if readable() else LOST
    return CLAIMED


def passes_self_test(learner: Learner, step: int, run_dir: Path | None) -> bool:
    """Run the log-probability self-test; collective, and all ranks get the same answer. The rank with `run_dir` records it.

    A refusal is a recorded answer, not an exception: Ray Train would start the ranks again, and they would find the same.
    """
    result = self_test(learner)
    if run_dir is not None:
        append_metrics(run_dir, result.record(learner.config, step))
    return result.refusal(learner.config) is None


def is_evaluated(config: RunConfig, step: int) -> bool:
    """Whether version `step` gets a periodic evaluation."""
    every = config.evaluation.every
    return every > 0 and step % every == 0 and step < config.updates


def publish(spec: LoopSpec, buffer: ReplayBuffer, learner: Learner, progress: Progress, rank: int, world: int, wanted: bool = False) -> None:
    """Make the weights of `progress.step` live: first in the weight store, then in the ledger, which frees the slots.

    Every rank hands in its own shard; the rank whose shard completes the version tells the ledger. `wanted`: the driver will ask
    for an evaluation of this version as soon as it reads of it, and release it; so no rank goes on before it is complete (collective).
    """
    config, name = spec.config, (progress.epoch, progress.step)
    dtype = None if config.weights.dtype == "float32" else getattr(torch, config.weights.dtype)
    if hand_in(spec.weights, spec.transport, learner.sampling_weights(), name, rank, world, PUBLISH_DEADLINE_S, dtype, wanted) and progress.step > 0:
        buffer.publish(progress.step, progress.epoch)
    if wanted:
        await_all(learner.device)


def can_be_read(spec: LoopSpec, epoch: int, step: int) -> bool:
    """Whether generators can read the version in place; True while that cannot be told, and where nobody samples from it."""
    if not spec.config.uses_policy:
        return True
    try:
        return bool(ray.get(spec.weights.stands.remote((epoch, step)), timeout=STORE_DEADLINE_S))
    except ray.exceptions.GetTimeoutError:
        return True


def _states(buffer: ReplayBuffer) -> dict[str, int]:
    counts = buffer.counts()
    return {k: counts[k] for k in ("leased", "ready", "claimed", "settled", "evicted", "dead", "data_ready") if k in counts}
