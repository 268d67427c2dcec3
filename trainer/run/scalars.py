"""TensorBoard and, if asked for, Weights & Biases: every number of metrics.jsonl as a scalar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from trainer.run.errors import RunFailed


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of a metrics line: `update/rewards/ocr`, `update/seconds/train`, `test/raw/rewards/ocr`, `self_test/…`"""
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
    """Writes metrics lines to TensorBoard, and sample grids beside them as they appear; of clips strips and an animation.

    Args:
        folder: where its files lie.
        resumed_at: step that the run goes on from; TensorBoard forgets what was written of later steps.
        samples: folder of the sample grids; those that lie there when a run goes on were written before.
    """

    def __init__(self, folder: Path, resumed_at: int = 0, samples: Path | None = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=resumed_at + 1)
        self._samples = samples
        self._drawn = {_stamp(path) for path in self._grids()} if resumed_at else set()
        self._step = resumed_at

    def add(self, record: Mapping[str, Any]) -> None:
        self._step = max(self._step, int(record["step"]))
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, int(record["step"]), walltime=record.get("time"))
        self._draw()

    def _grids(self) -> list[Path]:
        return sorted(self._samples.glob("*.png")) if self._samples is not None else []

    def _draw(self) -> None:
        from PIL import Image

        for path in self._grids():
            stamp = _stamp(path)
            if stamp in self._drawn:
                continue
            try:
                with Image.open(path) as picture:
                    pixels = np.asarray(picture.convert("RGB"))
            except OSError:  # not yet written whole: the next look finds it
                continue
            self._drawn.add(stamp)
            step = {"before": 0, "after": self._step}.get(path.stem)
            number = path.stem.removeprefix("step-")
            if step is None and number.isdecimal():
                step = int(number)
            if step is not None:
                self._writer.add_image("samples", pixels, step, dataformats="HWC")
                self._play(path.with_suffix(".mp4"), step)

    def _play(self, path: Path, step: int) -> None:
        """An animated GIF, which TensorBoard shows where it shows images; its own `add_video` writes the same with a package more."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        from actors.clips import animated

        if not path.exists():  # pictures
            return
        data, (width, height) = animated(path)
        image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        events: Any = self._writer.file_writer
        events.add_summary(Summary(value=[Summary.Value(tag="clips", image=image)]), step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._draw()
        self._writer.close()


def _stamp(path: Path) -> tuple[str, int]:
    return path.name, path.stat().st_mtime_ns


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
