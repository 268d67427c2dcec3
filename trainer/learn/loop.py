"""The training loop of one learner rank, run by Ray Train: self-test, then claim → update → publish → (every few steps) checkpoint.

Truth lies outside: the ledger says which groups a step has, the last registered checkpoint says which step to start
from. A checkpoint carries the ids claimed since the one before it, so a restart can settle them even if the ledger
forgot. `report` returning does not mean that a checkpoint is registered; settling is the controller's business
(`trainer.learn.settle`).
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
import torch.distributed as dist
from safetensors.torch import save

from actors.connect import Target
from diffusion.checkpoint import save_policy
from diffusion.device import resolve_device
from diffusion.engine.memory import keep_freed_memory
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.lora import adapter_bytes, merged_state
from replay.buffer import Claim, ReplayBuffer
from trainer.config.run import RunConfig
from trainer.learn.batch import step_batch
from trainer.learn.learner import Learner
from trainer.learn.metrics import ClaimMetrics
from trainer.learn.records import append_metrics, drop_metrics_after
from trainer.learn.selftest import self_test

PUBLISH_DEADLINE_S = 60.0
EXPORTS_KEPT = 2


@dataclass
class LoopSpec:
    """What every rank is given. `weights` is the WeightStore's actor handle."""

    config: RunConfig
    target: Target
    run_dir: str
    weights: Any


@dataclass
class Progress:
    """Where this rank is: the step it finished, the step of its last checkpoint (-1: none), the epoch that fences it, what
    was claimed since the last checkpoint."""

    step: int = 0
    saved: int = -1
    epoch: int = 0
    groups: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)


def _from_rank_zero(value: int, device: torch.device) -> int:
    box = torch.tensor([value], device=device)
    dist.broadcast(box, 0)
    return int(box)


def train_loop(settings: dict[str, Any]) -> None:
    """Entry point of a rank (`train_loop_per_worker`)."""
    spec: LoopSpec = settings["spec"]
    config, run_dir = spec.config, Path(spec.run_dir)
    torch.set_num_threads(config.learner.threads)
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    device = resolve_device("cuda" if config.learner.gpus > 0 else "cpu", f"learner.gpus={config.learner.gpus:g}", context.get_local_rank())
    buffer = spec.target.buffer()
    if device.type == "cpu":
        keep_freed_memory()
    learner = Learner(config, device)

    progress = restore(learner)
    epoch = buffer.rollback(progress.step, progress.groups, progress.data) if rank == 0 else 0
    progress.epoch, progress.groups, progress.data = _from_rank_zero(epoch, device), [], []
    if rank == 0:
        drop_metrics_after(run_dir, progress.step)
    publish(spec, buffer, learner, progress, rank, world)
    if config.uses_policy and progress.step < config.updates and not passes_self_test(learner, progress.step, run_dir if rank == 0 else None):
        return

    skipped, claims = 0, ClaimMetrics(config.name)
    while progress.step < config.updates:
        stop = _from_rank_zero(int(buffer.stop_requested()) if rank == 0 else 0, device)
        if stop:
            break
        step, started = progress.step + 1, time.monotonic()
        claim = buffer.claim(step, progress.epoch, config.replay.claim_timeout_s)
        claimed = time.monotonic()
        batch = step_batch(config, learner.process, learner.kernel, buffer, claim, rank, world)
        stats = learner.update(batch, step)
        trained = time.monotonic()
        progress.step = step
        progress.groups.extend(g.group for g in claim.groups)
        progress.data.extend(d.batch for d in claim.data)
        if config.uses_policy or is_evaluated(config, step):
            publish(spec, buffer, learner, progress, rank, world)
        elif rank == 0:
            buffer.publish(step, progress.epoch)  # nobody samples from this version
        if rank == 0:
            seconds = {"wait": claimed - started, "train": trained - claimed, "publish": time.monotonic() - trained}
            claims.claimed(seconds["wait"], [step - 1 - g.header.version for g in claim.groups])
            record = update_record(step, claim, stats, seconds, batch.zero_variance_groups)
            append_metrics(run_dir, record | {"groups": _states(buffer)})
        skipped = skipped + 1 if stats["skipped"] else 0
        if skipped > config.learner.max_skipped:
            raise RuntimeError(f"gradients were not finite {skipped} updates in a row; lower optimizer.lr or sampler.noise_level")
        if step % config.checkpoint_every == 0:
            checkpoint(spec, learner, progress, rank)
    if progress.saved < progress.step:
        checkpoint(spec, learner, progress, rank)


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


def restore(learner: Learner) -> Progress:
    """Load the last registered checkpoint, if any; returns its step and the ids claimed up to it."""
    saved = ray.train.get_checkpoint()
    if saved is None:
        return Progress()
    with saved.as_directory() as folder:
        meta = json.loads((Path(folder) / "progress.json").read_text())
        learner.load(Path(folder))
    return Progress(step=meta["step"], saved=meta["step"], groups=meta["groups"], data=meta["data"])


def publish(spec: LoopSpec, buffer: ReplayBuffer, learner: Learner, progress: Progress, rank: int, world: int) -> None:
    """Make the weights of `progress.step` live: first in the weight store, then in the ledger, which frees the slots.

    Every rank hands in its own shard; the rank whose shard completes the version tells the ledger.
    """
    shard = spec.weights.publish_shard.remote(progress.step, progress.epoch, rank, world, save(learner.shard(rank)))
    if ray.get(shard, timeout=PUBLISH_DEADLINE_S) and progress.step > 0:
        buffer.publish(progress.step, progress.epoch)


def checkpoint(spec: LoopSpec, learner: Learner, progress: Progress, rank: int) -> None:
    """Export the policy, save the shards and report; collective. Every rank uploads its own folder, Ray merges them."""
    raw, average = learner.full_state(), learner.full_state(ema=True) if learner.ema else None
    if rank == 0:
        export(spec, progress.step, raw, average)
    folder = Path(tempfile.mkdtemp(prefix=f"ddrl-step{progress.step}-"))
    try:
        learner.save(folder)
        if rank == 0:
            meta = {"step": progress.step, "epoch": progress.epoch, "groups": progress.groups, "data": progress.data}
            (folder / "progress.json").write_text(json.dumps(meta) + "\n")
        saved = ray.train.Checkpoint.from_directory(str(folder))
        metrics = {"step": progress.step, "epoch": progress.epoch, "reported_at": time.time()}
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"step-{progress.step:06d}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress.saved, progress.groups, progress.data = progress.step, [], []


def export(spec: LoopSpec, step: int, raw: dict[str, torch.Tensor], average: dict[str, torch.Tensor] | None) -> None:
    """Write `exports/step-N` and, with an average, `exports/step-N-ema`: folders that diffusers opens. Keeps the newest two.

    A trained adapter stands there merged into the network, and beside it as a file of its own.
    """
    root, source, lora = Path(spec.run_dir) / "exports", Path(spec.config.model.path), spec.config.model.lora
    for suffix, state in (("", raw), ("-ema", average)):
        if state is not None:
            extra = {LORA_WEIGHTS: adapter_bytes(state, lora)} if lora.rank else {}
            save_policy(root / f"step-{step:06d}{suffix}", source, merged_state(state, lora), extra)
    steps = sorted({f.name.split("-")[1] for f in root.glob("step-*") if f.suffix != ".partial"})
    for old in steps[:-EXPORTS_KEPT]:
        for folder in root.glob(f"step-{old}*"):
            shutil.rmtree(folder, ignore_errors=True)


def _states(buffer: ReplayBuffer) -> dict[str, int]:
    counts = buffer.counts()
    return {k: counts[k] for k in ("leased", "ready", "claimed", "settled", "evicted", "dead", "data_ready") if k in counts}


def update_record(step: int, claim: Claim, stats: dict[str, Any], seconds: dict[str, float], zero_variance_groups: int) -> dict[str, Any]:
    """The metrics line of one update."""
    record: dict[str, Any] = {"kind": "update", "step": step, **stats, "seconds": {k: round(v, 4) for k, v in seconds.items()}}
    if claim.groups:
        rewards = torch.tensor([r for g in claim.groups for r in g.header.rewards], dtype=torch.float64)
        within = torch.tensor([torch.tensor(g.header.rewards, dtype=torch.float64).std() for g in claim.groups])
        staleness = [step - 1 - g.header.version for g in claim.groups]
        record |= {
            "reward_mean": float(rewards.mean()),
            "reward_std": float(within.mean()),
            "trained_groups": [g.group for g in claim.groups],
            "failed_members": sum(int(g.header.meta.get("failed_members", 0)) for g in claim.groups),
            "zero_variance_groups": zero_variance_groups,
            "staleness_mean": sum(staleness) / len(staleness),
            "staleness_max": max(staleness),
        }
        for name in ("sample", "score"):
            values = [float(g.header.meta[f"{name}_s"]) for g in claim.groups if f"{name}_s" in g.header.meta]
            record["seconds"][name] = round(sum(values) / max(1, len(values)), 4)
    return record
