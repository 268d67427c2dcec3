"""The run folder: where everything a run leaves behind lies, and who may write there.

    config.yaml  metrics.jsonl  tensorboard/  summary.json  report.html  eval/  samples/  exports/  checkpoints/
    redis/ (embedded server)  weights/ (newest published version)  ray.log, redis.log …

A folder belongs to one run at a time: a lock file holds the driver's process id while it runs.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import IO, Any

from trainer.config.errors import ConfigError
from trainer.config.load import load_config
from trainer.config.render import render_config
from trainer.config.run import RunConfig
from trainer.learn.records import append_metrics
from trainer.report.tail import read_lines

MIN_FREE_MB = 200
"""Free space a run needs at start: checkpoints, exports and Redis's log of a small model."""


class RunFolderError(ConfigError):
    """The run folder cannot be used; the message says why and what to do."""


RESUMABLE = ("updates", "checkpoint_every", "max_dead_groups", "wandb_project", "learner", "evaluation", "reward", "redis", "ray")
"""Settings that may change when a run goes on; the others would make it another run."""


def changed_settings(before: RunConfig, now: RunConfig) -> list[str]:
    """Dotted keys that differ and may not differ on resume."""
    one, two = before.model_dump(), now.model_dump()
    found = []
    for section in one.keys() - set(RESUMABLE):
        if isinstance(one[section], dict):
            found += [f"{section}.{key}" for key, value in one[section].items() if two[section][key] != value]
        elif one[section] != two[section]:
            found.append(section)
    return sorted(found)


class RunFolder:
    """Paths of a run. `open` takes the folder for this process."""

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        self.metrics = self.path / "metrics.jsonl"
        self.summary = self.path / "summary.json"
        self.checkpoints = self.path / "checkpoints"
        self.exports = self.path / "exports"
        self.weights = self.path / "weights"
        self.redis = self.path / "redis"
        self._lock: IO[str] | None = None

    def open(self, config: RunConfig, resume: bool) -> None:
        """Create or reopen the folder. Raises RunFolderError."""
        started = (self.path / "config.yaml").exists()
        if started and not resume:
            raise RunFolderError(
                f"run folder {self.path} already holds a run; add --resume to go on with it, or choose another name (--set name=…) or --run-dir"
            )
        if resume and not started:
            raise RunFolderError(f"nothing to resume: {self.path} holds no run; start it without --resume")
        if started:
            changed = changed_settings(load_config(self.path / "config.yaml"), config)
            if changed:
                raise RunFolderError(f"run folder {self.path} was started with other settings ({', '.join(changed)}); give the same ones, or start a new run")
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.path).free >> 20
            if free < MIN_FREE_MB:
                raise RunFolderError(
                    f"the disk of run folder {self.path} has {free} MB free, a run needs {MIN_FREE_MB} MB; free some space or choose another --run-dir"
                )
            self._lock = (self.path / "lock").open("a+")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._lock.truncate(0)
            self._lock.write(f"{os.getpid()}\n")
            self._lock.flush()
            partial = self.path / "config.partial"
            partial.write_text(render_config(config))
            partial.rename(self.path / "config.yaml")
        except BlockingIOError:
            raise RunFolderError(f"run folder {self.path} is in use by another ddrl process") from None
        except OSError as error:
            raise RunFolderError(f"run folder {self.path} cannot be written: {error.strerror}") from None

    def forget_failed_start(self) -> None:
        """A start that failed before anything was made leaves no run behind: the mended command may use the folder again."""
        if self._lock is None or self.metrics.exists() or self.checkpoints.exists():
            return
        (self.path / "config.yaml").unlink(missing_ok=True)
        for folder in (self.redis, self.weights):
            shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def append(self, record: dict[str, Any]) -> None:
        """Add one line to metrics.jsonl; a line is written whole or not at all."""
        append_metrics(self.path, record)

    def records(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl and evaluations.jsonl in the order of time; a torn last line (crash) is left out."""
        return read_lines(self.path)
