"""Exported policies of a run: folders that diffusers opens; gathered by all ranks, written by rank 0's thread. Of an adapter that alone is
gathered, and merged into the starting policy's files as they are copied.

Invariant: between two collectives no rank waits for a disk that the others do not wait for. Gathering an export is
collective and costs one copy in rank 0's memory; writing it may take longer than `learner.collective_timeout_s`. When the
writer is still busy at the next checkpoint, that copy waits, and a newer one takes its place. The newest is always written:
`finish` waits for it at the end of the loop, where no collective is open. A restart that finds the export of its checkpoint
missing (the writer was killed) makes it again.
"""

from __future__ import annotations

import shutil
import threading
from pathlib import Path

import torch

from diffusion.checkpoint import merged_policy, save_policy
from diffusion.config import ModelConfig
from diffusion.lora import WEIGHTS as LORA_WEIGHTS
from diffusion.lora import adapter_bytes, merged_state
from diffusion.source import locate
from trainer.learn.checkpoint import from_rank_zero
from trainer.learn.learner import Learner

EXPORTS_KEPT = 2
EXPORT_DEADLINE_S = 3600.0

State = dict[str, torch.Tensor]


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
