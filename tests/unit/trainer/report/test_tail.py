"""Following metrics.jsonl: every complete line once, whatever happens to the file."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.learn.records import drop_metrics_after
from trainer.report.tail import MetricsTail


def line(step: int, time: float = 0.0) -> bytes:
    return json.dumps({"kind": "update", "step": step, "time": time}).encode() + b"\n"


def steps(records: list[dict[str, Any]]) -> list[int]:
    return [r["step"] for r in records]


def append(path: Path, data: bytes) -> None:
    with path.open("ab") as file:
        file.write(data)


def test_a_file_that_is_not_there_yet(tmp_path: Path) -> None:
    tail = MetricsTail(tmp_path / "metrics.jsonl")
    assert tail.read() == []
    append(tmp_path / "metrics.jsonl", line(1))
    assert steps(tail.read()) == [1]
    assert tail.read() == []


@given(cuts=st.lists(st.integers(0, 400), max_size=8))
@settings(max_examples=30)
def test_lines_written_in_any_pieces_are_seen_once_and_whole(cuts: list[int], tmp_path_factory: Any) -> None:
    path = tmp_path_factory.mktemp("tail") / "metrics.jsonl"
    data = b"".join(line(s) for s in range(6))
    bounds = [0, *sorted(min(c, len(data)) for c in cuts), len(data)]
    tail, seen = MetricsTail(path), []
    for a, b in itertools.pairwise(bounds):
        append(path, data[a:b])
        seen += steps(tail.read())
    assert seen == list(range(6))


def test_a_broken_line_is_left_out_and_the_next_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, line(1) + b'{"step": 2, \n' + line(3))
    assert steps(MetricsTail(path).read()) == [1, 3]


def test_after_a_restart_only_what_is_new_is_told(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, b"".join(line(s, time=s) for s in range(1, 5)) + b'{"kind": "upd')
    tail = MetricsTail(path)
    assert steps(tail.read()) == [1, 2, 3, 4]
    drop_metrics_after(tmp_path, 2)
    assert tail.read() == []
    append(path, line(3, time=9))  # made again: a new line, told again
    assert steps(tail.read()) == [3]


def test_a_file_that_became_shorter_than_what_was_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, b"".join(line(s) for s in range(5)))
    tail = MetricsTail(path)
    tail.read()
    os.replace(path, tmp_path / "old")
    assert tail.read() == []
    append(path, line(7))
    assert steps(tail.read()) == [7]


class ReplacedWhileRead(type(Path())):  # type: ignore[misc]
    """A path whose file is replaced between being opened and being asked for its inode."""

    def stat(self, **keys: Any) -> os.stat_result:
        waiting = Path(str(self) + ".new")
        if waiting.exists():
            os.replace(waiting, str(self))
        return os.stat(str(self))


def test_a_file_replaced_in_the_middle_of_a_read(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, line(1) + line(2))
    append(tmp_path / "metrics.jsonl.new", line(1) + b'{"kind": "eval", "step": 0, "time": 5, "longer": "than the line it stands for"}\n')
    tail = MetricsTail(ReplacedWhileRead(path))
    seen = steps(tail.read())
    if (tmp_path / "metrics.jsonl.new").exists():  # never asked by name: replace it now
        os.replace(tmp_path / "metrics.jsonl.new", path)
    seen += steps(tail.read())
    assert sorted(seen) in ([0, 1], [0, 1, 2])
