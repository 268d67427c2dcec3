"""What outlives the ranks: registered checkpoints (collective) and exported policies (rank 0 alone, in the background).

    checkpoint   DCP shards of weights, optimiser and average, each rank its own, with progress.json; all ranks together
    export       a policy folder that diffusers opens; gathered by all ranks, written by rank 0's thread; of an adapter that alone is
                 gathered, and merged into the starting policy's files as they are copied

Invariant: between two collectives no rank waits for a disk that the others do not wait for. Gathering an export is
collective and costs one copy in rank 0's memory; writing it may take longer than `learner.collective_timeout_s`. When the
writer is still busy at the next checkpoint, that copy waits, and a newer one takes its place. The newest is always written:
`finish` waits for it at the end of the loop, where no collective is open. A restart that finds the export of its checkpoint
missing (the writer was killed) makes it again.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist

from diffusion.checkpoint import merged_policy, save_policy
from diffusion.config import ModelConfig
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.lora import adapter_bytes, merged_state
from diffusion.source import locate
from trainer.learn.entry import FOLDER_VARIABLE
from trainer.learn.learner import Learner

EXPORTS_KEPT = 2
EXPORT_DEADLINE_S = 3600.0
PROGRESS = "progress.json"

State = dict[str, torch.Tensor]


@dataclass
class Progress:
    """Where this rank is: the step it finished, the step of its last checkpoint (-1: none), the epoch that fences it, what
    was claimed since the last checkpoint."""

    step: int = 0
    saved: int = -1
    epoch: int = 0
    groups: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)


def from_rank_zero(value: int, device: torch.device) -> int:
    """Rank 0's `value`, on every rank; collective."""
    box = torch.tensor([value], device=device)
    dist.broadcast(box, 0)
    return int(box)


def restore(learner: Learner) -> Progress:
    """Load the last registered checkpoint, if any; returns its step and the ids claimed up to it."""
    saved = ray.train.get_checkpoint()
    if saved is None:
        return Progress()
    with saved.as_directory() as folder:
        return read(Path(folder), learner)


def checkpoint(learner: Learner, progress: Progress, rank: int) -> None:
    """Save the shards and report; collective. Every rank uploads its own folder, Ray merges them."""
    folder = scratch_folder(progress.step)
    try:
        write(folder, learner, progress, rank)
        saved = ray.train.Checkpoint.from_directory(str(folder))
        metrics = {"step": progress.step, "epoch": progress.epoch, "reported_at": time.time()}
        ray.train.report(metrics, checkpoint=saved, checkpoint_dir_name=f"step-{progress.step:06d}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    progress.saved, progress.groups, progress.data = progress.step, [], []


def scratch_folder(step: int) -> Path:
    """A new folder for this rank's shards until they are uploaded. It lies in the local cluster's folder where there is one, so that
    what a killed rank leaves, which may be gigabytes, goes with the cluster."""
    return Path(tempfile.mkdtemp(prefix=f"ddrl-step{step}-", dir=os.environ.get(FOLDER_VARIABLE)))


def write(folder: Path, learner: Learner, progress: Progress, rank: int) -> None:
    """This rank's part of a checkpoint; collective. Rank 0 adds where the run is and how long its schedule is."""
    learner.save(folder)
    if rank == 0:
        meta: dict[str, Any] = {"step": progress.step, "epoch": progress.epoch, "groups": progress.groups, "data": progress.data}
        (folder / PROGRESS).write_text(json.dumps(meta | {"decay_updates": learner.decay_updates}) + "\n")


def read(folder: Path, learner: Learner) -> Progress:
    """Restore `learner` from a complete checkpoint; collective. The schedule keeps the length that it began with."""
    meta = json.loads((folder / PROGRESS).read_text())
    learner.load(folder)
    learner.decay_updates = meta.get("decay_updates", learner.decay_updates)
    return Progress(step=meta["step"], saved=meta["step"], groups=meta["groups"], data=meta["data"])


class Exports:
    """Exported policies of a run: `exports/step-N` and, with an average, `exports/step-N-ema`. The newest two are kept.

    Args:
        folder: the run's `exports`.
        model: the policy that training started from.
        rank: this rank; only rank 0 keeps and writes anything.
    """

    def __init__(self, folder: Path, model: ModelConfig, rank: int) -> None:
        self._folder, self._model, self._rank = folder, model, rank
        self._adapts = model.lora.rank > 0 and not model.init  # what is frozen is the starting policy's folder
        self._lock = threading.Lock()
        self._waiting: tuple[int, State, State | None] | None = None
        self._writer: threading.Thread | None = None
        self._error: Exception | None = None
        self._written: Path | None = None  # the newest, for the weights of frozen parts, which all exports share

    def take(self, learner: Learner, step: int) -> None:
        """Gather the policy of `step` and have it written; collective, returns before it is on disk.

        Raises:
            Exception: on rank 0, what made an earlier export fail.
        """
        keep, frozen = self._rank == 0, not self._adapts
        raw = learner.full_state(keep=keep, frozen=frozen)
        average = learner.full_state(ema=True, keep=keep, frozen=frozen) if learner.ema else None
        if not keep:
            return
        self._raise()
        with self._lock:
            self._waiting = (step, raw, average)
            if self._writer is None:
                self._writer = threading.Thread(target=self._write_all, name="export", daemon=True)
                self._writer.start()

    def take_missing(self, learner: Learner, step: int) -> None:
        """`take`, where a checkpoint of `step` stands without its export; collective."""
        there = step == 0 or self._path(step, "-ema" if learner.ema else "").is_dir()
        if from_rank_zero(int(there), learner.device) == 0:
            self.take(learner, step)

    def finish(self, deadline_s: float = EXPORT_DEADLINE_S) -> None:
        """Wait until everything taken is written; no collective.

        Raises:
            TimeoutError: it takes longer than `deadline_s`.
            Exception: what made an export fail.
        """
        writer = self._writer
        if writer is not None:
            writer.join(deadline_s)
            if writer.is_alive():
                raise TimeoutError(f"an export to {self._folder} took longer than {deadline_s:.0f} s; is the run folder's file system slow or full?")
        self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def _write_all(self) -> None:
        while True:
            with self._lock:
                job, self._waiting = self._waiting, None
                if job is None:
                    self._writer = None
                    return
            try:
                self._write(*job)
            except Exception as error:  # raised again on the rank's own thread
                self._error = error

    def _write(self, step: int, raw: State, average: State | None) -> None:
        """A trained adapter stands in an export merged into the network, and beside it as a file of its own. The average is
        written last: its folder tells that both are there."""
        lora = self._model.lora
        for suffix, state in (("", raw), ("-ema", average)):
            if state is not None:
                extra = {LORA_WEIGHTS: adapter_bytes(state, lora)} if lora.rank else {}
                source = locate(self._model.path, self._model.revision).folder
                path = self._path(step, suffix)
                merged = merged_policy(source, state, self._model) if self._adapts else merged_state(state, lora)
                save_policy(path, source, merged, extra, self._written)
                self._written = path
        steps = sorted({f.name.split("-")[1] for f in self._folder.glob("step-*") if f.suffix != ".partial"})
        for old in steps[:-EXPORTS_KEPT]:
            for folder in self._folder.glob(f"step-{old}*"):
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, step: int, suffix: str) -> Path:
        return self._folder / f"step-{step:06d}{suffix}"
