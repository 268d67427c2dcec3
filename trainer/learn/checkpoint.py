"""Registered checkpoints of the learner group, written while training goes on.

    staged      every rank has copied its shards of weights, optimiser and average into host memory, and trains on
    written     a thread of every rank writes them into the run's `checkpoints/step-N`, all of them together (DCP), no other copy between
    registered  every rank's thread has handed its report to Ray Train, whose controller has noted the checkpoint; the ledger settles
                (`trainer.learn.settle`)

Invariants:
    1. Nothing is registered that is not whole: a rank reports when the shards of all ranks and their table of contents are on disk.
       What ranks that were killed left behind is a folder that nobody knows; the next start removes it.
    2. Checkpoints are registered in the order in which they were taken, and one is written at a time: the next waits for it.
    3. The threads agree with each other over a group of their own, so no collective of the ranks waits for a disk.
    4. A checkpoint carries what was claimed since the one before it was staged. When one is lost, so are those after it: the
       ranks start again from the last that is registered, and the ledger serves again what was claimed after that.

Worked example: a checkpoint every 2 updates. That of step 2 is staged with the groups of steps 1 and 2, and being written while steps 3
and 4 are trained. Before that of step 4 is staged, that of step 2 has been written. A rank killed before step 2 is registered takes the run
back to the start, and the same groups are served again; killed after that, back to step 2, and the groups of steps 1 and 2 are settled.
"""

from __future__ import annotations

import json
import shutil
import time
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray.train
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ray.train import CheckpointUploadMode
from torch.distributed.checkpoint.api import CheckpointException

from trainer.learn.learner import Learner

WRITE_DEADLINE_S = 3600.0
PROGRESS = "progress.json"


class CheckpointFailed(Exception):
    """A checkpoint that could not be written; says where and why."""


@dataclass
class Progress:
    """Where this rank is: the step it finished, the step of its last checkpoint (-1: none), the epoch that fences it, what
    was claimed since the last checkpoint."""

    step: int = 0
    saved: int = -1
    epoch: int = 0
    groups: list[int] = field(default_factory=list)
    data: list[int] = field(default_factory=list)


def await_all(device: torch.device) -> None:
    """Go on when every rank is here; collective."""
    box = torch.ones(1, device=device)
    dist.all_reduce(box)
    box.item()


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


def read(folder: Path, learner: Learner) -> Progress:
    """Restore `learner` from a complete checkpoint; collective. The schedule keeps the length that it began with."""
    meta = json.loads((folder / PROGRESS).read_text())
    learner.load(folder)
    learner.decay_updates = meta.get("decay_updates", learner.decay_updates)
    return Progress(step=meta["step"], saved=meta["step"], groups=meta["groups"], data=meta["data"])


def staged(tree: Any) -> Any:
    """A copy of a tree of tensors, shards and numbers whose tensors are in host memory; no collective."""
    if isinstance(tree, dict):
        return {name: staged(part) for name, part in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(staged(part) for part in tree)
    return tree.detach().to("cpu", copy=True) if isinstance(tree, torch.Tensor) else tree


def save_shards(shards: dict[str, Any], folder: Path, group: dist.ProcessGroup | None = None) -> None:
    """Write this rank's shards (DCP) and, on rank 0, the table of all ranks' shards; collective in `group`.

    Raises:
        CheckpointFailed: on every rank, when one of them could not write, or does not write to the folder that rank 0 sees.
    """
    try:
        table = dcp.save(shards, storage_writer=dcp.FileSystemWriter(folder, per_thread_copy_ahead=0), process_group=group)
    except CheckpointException as error:  # no Exception, and a page of tracebacks
        why = "; ".join(f"rank {rank}: {cause!r}" for rank, (cause, _) in error.failures.items())
        raise CheckpointFailed(f"the checkpoint {folder} could not be written ({why}); is its file system full, or not writable?") from None
    files = {stored.relative_path for stored in (table.storage_data or {}).values()}
    missing = sorted(name for name in files if not (folder / name).exists())
    if missing:
        raise CheckpointFailed(f"{', '.join(missing)} of the checkpoint {folder} cannot be seen by all ranks: the run folder must be shared by all nodes")


def remove_unregistered(folder: Path, step: int) -> None:
    """Remove what ranks that were killed wrote of checkpoints after `step`, the last registered one."""
    for path in folder.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdecimal() and int(number) > step:
            shutil.rmtree(path, ignore_errors=True)


class Writing:
    """One rank's part of a checkpoint on its way to disk. Ray Train calls it as `checkpoint_upload_fn`, in the background in a thread of
    its own.

    Attributes:
        done: ends with the last shard, or with what made it fail.
    """

    def __init__(self, shards: dict[str, Any], meta: dict[str, Any] | None, group: dist.ProcessGroup) -> None:
        self._shards, self._meta, self._group = shards, meta, group
        self.done: Future[None] = Future()

    def __call__(self, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
        folder = Path(checkpoint.path)
        try:
            save_shards(self._shards, folder, self._group)
            if self._meta is not None:
                (folder / PROGRESS).write_text(json.dumps(self._meta) + "\n")
        except BaseException as error:
            self.done.set_exception(error)
            raise
        finally:
            self._shards = {}
        self.done.set_result(None)
        return checkpoint


class Checkpoints:
    """Checkpoints of this rank's group; every method is called by all ranks. Making it is collective.

    Args:
        folder: the run's `checkpoints`, shared by all ranks.
        rank: this rank; rank 0 adds where the run is and how long its schedule is.
        background: write while training goes on; False = ranks wait for the disk, and no copy is made.
    """

    def __init__(self, folder: Path, rank: int, background: bool) -> None:
        self._folder, self._rank, self._background = folder, rank, background
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WRITE_DEADLINE_S))
        self._writing: Writing | None = None

    def take(self, learner: Learner, progress: Progress) -> None:
        """Have the state of `progress.step` written and registered, once the checkpoint before has been written.

        Raises:
            Exception: what made the checkpoint before fail, see `finish`.
        """
        self.finish()
        shards, name = learner.shards(), f"step-{progress.step:06d}"
        meta = {"step": progress.step, "epoch": progress.epoch, "groups": progress.groups, "data": progress.data, "decay_updates": learner.decay_updates}
        self._writing = Writing(staged(shards) if self._background else shards, meta if self._rank == 0 else None, self._group)
        ray.train.report(
            {"step": progress.step, "epoch": progress.epoch, "reported_at": time.time()},
            checkpoint=ray.train.Checkpoint.from_directory(str(self._folder / name)),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.ASYNC if self._background else CheckpointUploadMode.SYNC,
            delete_local_checkpoint_after_upload=False,
            checkpoint_upload_fn=self._writing,
        )
        progress.saved, progress.groups, progress.data = progress.step, [], []

    def finish(self, deadline_s: float = WRITE_DEADLINE_S) -> None:
        """Wait until what was taken is written; no collective.

        Raises:
            TimeoutError: it takes longer than `deadline_s`.
            CheckpointFailed: a rank could not write.
        """
        if self._writing is None:
            return
        if not wait([self._writing.done], deadline_s).done:
            raise TimeoutError(f"a checkpoint in {self._folder} was not written within {deadline_s:.0f} s; is the run folder's file system slow or full?")
        self._writing.done.result()
