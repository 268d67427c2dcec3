"""The run folder: where everything a run leaves behind lies, who may write there, and how the run stands.

    config.yaml  state.json  metrics.jsonl  evaluations.jsonl  tensorboard/  summary.json  report.html  eval/  samples/  exports/
    checkpoints/  redis/ (embedded server)  weights/ (newest published versions)  payloads/ (of a tiny run)  ray.log, redis.log …

A folder belongs to one run at a time: a lock file holds the driver's process id while it runs. `state.json` says how the run
stands: `running` (nobody holds the lock: it was killed), `finished`, `interrupted` or `failed`. A folder whose run never finished
an update holds no run: what is left in it is removed when the next one starts.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Literal

from actors.weights.transport import FolderTransport
from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.render import render_config
from trainer.config.run import RunConfig
from trainer.report.tail import read_lines
from trainer.run.lines import append_line, lines_of
from trainer.run.resume import changed_settings, finished_updates, forget_after, refuse_fewer_updates, registered_step

MIN_FREE_MB = 200
"""Free space a run needs at start: checkpoints, exports and Redis's log of a small model."""

State = Literal["running", "finished", "interrupted", "failed"]


class RunFolderError(ConfigError):
    """The run folder cannot be used; the message says why and what to do."""


class RunFolder:
    """Paths of a run. `open` takes the folder for this process.

    Attributes:
        step: the update that the run goes on from; 0 for a new one.
        leftover: whether the folder held a start that never finished an update.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.metrics = self.path / "metrics.jsonl"
        self.evaluations = self.path / "evaluations.jsonl"
        self.summary = self.path / "summary.json"
        self.state = self.path / "state.json"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.weights = self.path / "weights"
        self.redis = self.path / "redis"
        self.step = 0
        self.leftover = False
        self._lock: IO[str] | None = None
        self._started = time.time()

    def open(self, config: RunConfig, resume: bool, notes: Sequence[str] = ()) -> None:
        """Create or reopen the folder; `notes` are lines of comment in its config.yaml. Raises RunFolderError, or ConfigError for settings
        that are another run's."""
        recipe = self.path / "config.yaml"
        if resume and not recipe.exists():
            raise RunFolderError(f"nothing to resume: {self.path} holds no run; start it without --resume")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            started = recipe.exists()
            if started and not resume:
                if finished_updates(self.path) > 0:
                    raise RunFolderError(
                        f"run folder {self.path} already holds a run; add --resume to go on with it, or choose another name (--set name=…) or --run-dir"
                    )
                self._clear()
            elif started:
                self._go_on(config)
            if config.weights.path is not None:
                self._share_weights(Path(config.weights.path) / config.name, started)
            free = shutil.disk_usage(self.path).free >> 20
            if free < MIN_FREE_MB:
                raise RunFolderError(
                    f"the disk of run folder {self.path} has {free} MB free, a run needs {MIN_FREE_MB} MB; free some space or choose another --run-dir"
                )
            partial = self.path / "config.partial"
            partial.write_text(render_config(config, notes))
            partial.rename(recipe)
            self.mark("running")
        except BlockingIOError:
            raise RunFolderError(f"run folder {self.path} is in use by another ddrl process") from None
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be written: {error.strerror}") from None

    def _share_weights(self, folder: Path, started: bool) -> None:
        """Take a folder outside of the run's own for its weights. What lies there of another run, which may be live, is not touched."""
        self.weights, there = folder, FolderTransport(str(folder))
        if self.leftover:
            there.clear()
        elif not started and there.recall():
            raise RunFolderError(
                f"weights.path: {folder} holds weights of another run of this name; choose another name (--set name=…), or remove it if that run is over"
            )

    def _take_lock(self) -> None:
        self._lock = (self.path / "lock").open("a+")
        fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._lock.truncate(0)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()

    def _clear(self) -> None:
        """Remove what a start that came to nothing has left."""
        self.leftover = True
        for folder in ("redis", "weights", "checkpoints", "exports", "eval", "samples", "tensorboard", "payloads"):
            shutil.rmtree(self.path / folder, ignore_errors=True)
        for file in (self.metrics, self.evaluations, self.summary, self.state, self.path / "report.html"):
            file.unlink(missing_ok=True)

    def _go_on(self, config: RunConfig) -> None:
        changed = changed_settings(load_config(self.path / "config.yaml"), config)
        if changed:
            raise RunFolderError(f"run folder {self.path} was started with other settings ({', '.join(changed)}); give the same ones, or start a new run")
        self.step = registered_step(self.checkpoints)
        refuse_fewer_updates(config, self.step)
        forget_after(self.path, self.step)
        for file in (self.summary, self.path / "report.html"):  # they tell of the end that is taken back
            file.unlink(missing_ok=True)

    def mark(self, state: State, reason: str = "", status: int | None = None) -> None:
        """Write state.json, whole or not at all. `status`: the exit status of an ended run."""
        ended = None if state == "running" else round(time.time(), 3)
        step = finished_updates(self.path)
        value = {"state": state, "reason": reason, "exit": status, "step": step, "started": round(self._started, 3), "ended": ended, "pid": os.getpid()}
        partial = self.state.with_suffix(".partial")
        partial.write_text(json.dumps(value) + "\n")
        partial.rename(self.state)

    def mark_end(self, state: State, reason: str, status: int) -> None:
        """`mark` for an end that the driver did not get to tell of."""
        if any(record.get("state") == "running" for record in lines_of(self.state)):
            self.mark(state, reason, status)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append_evaluation(self, record: dict[str, Any]) -> None:
        """Add one line to evaluations.jsonl, which only the driver writes."""
        append_line(self.evaluations, record)

    def records(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl and evaluations.jsonl in the order of time; a torn last line (crash) is left out."""
        return read_lines(self.path)
