"""TensorBoard and, if asked for, Weights & Biases: every number of metrics.jsonl as a scalar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from trainer.run.errors import RunFailed


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of a metrics line: `update/reward_mean`, `update/seconds/train`, `test/raw/reward`, `self_test/…`"""
    kind = str(record.get("kind"))
    prefix = kind if kind in ("update", "self_test") else f"{record.get('split')}/{record.get('weights')}"
    for name, value in record.items():
        if name in ("kind", "step", "time", "prompts"):
            continue
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, number in nested:
            if isinstance(number, int | float):
                yield "/".join(filter(None, (prefix, name, inner))), float(number)


class Scalars:
    """Writes metrics lines to TensorBoard.

    Args:
        folder: where its files lie.
        resumed_at: step that the run goes on from; TensorBoard forgets what was written of later steps.
    """

    def __init__(self, folder: Path, resumed_at: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=resumed_at + 1 if resumed_at else None)

    def add(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, int(record["step"]), walltime=record.get("time"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()


class Wandb:
    """Writes metrics lines to a Weights & Biases run; the x axis is `update`, so late evaluations keep their place.

    Args:
        project: W&B project; login, host and offline mode come from W&B's own environment variables.
        name: name and id of the run, so that a resumed run goes on in the same place.
        settings: the resolved configuration.
        folder: where W&B keeps its files.
    Raises:
        RunFailed: the package is not installed, or W&B cannot start.
    """

    def __init__(self, project: str, name: str, settings: dict[str, Any], folder: Path) -> None:
        try:
            import wandb
        except ImportError:
            raise RunFailed("wandb", "wandb_project is set but the package is missing; pip install 'ddrl[wandb]', or set wandb_project=null") from None
        try:
            self._run = wandb.init(project=project, name=name, id=name, resume="allow", config=settings, dir=str(folder))
        except wandb.Error as error:
            raise RunFailed("wandb", str(error)) from error
        self._run.define_metric("*", step_metric="update")

    def add(self, record: Mapping[str, Any]) -> None:
        self._run.log(dict(scalars(record)) | {"update": int(record["step"])})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)
