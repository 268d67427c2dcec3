"""TensorBoard: every number of metrics.jsonl as a scalar."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self


def scalars(record: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """(tag, value) of a metrics line: `update/reward_mean`, `update/seconds/train`, `test/raw/reward`, …"""
    prefix = "update" if record.get("kind") == "update" else f"{record.get('split')}/{record.get('weights')}"
    for name, value in record.items():
        if name in ("kind", "step", "time", "prompts"):
            continue
        nested = value.items() if isinstance(value, Mapping) else [("", value)]
        for inner, number in nested:
            if isinstance(number, int | float):
                yield "/".join(filter(None, (prefix, name, inner))), float(number)


class Scalars:
    """Writes metrics lines to a TensorBoard folder."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def add(self, record: Mapping[str, Any]) -> None:
        for tag, value in scalars(record):
            self._writer.add_scalar(tag, value, int(record["step"]), walltime=record.get("time"))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._writer.close()
