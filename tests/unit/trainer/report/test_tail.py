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
from trainer.report.tail import MetricsTail, read_lines


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


def test_the_two_files_of_a_run_are_one_stream_by_time(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", b"".join(line(s, time=10.0 * s) for s in (1, 2, 3)) + b'{"kind": "upd')
    evaluations = [json.dumps({"kind": "evaluation", "step": s, "time": t}).encode() + b"\n" for s, t in ((0, 5.0), (2, 25.0))]
    append(tmp_path / "evaluations.jsonl", b"".join(evaluations) + evaluations[0] + b"[1]\n")
    problems: list[str] = []
    found = read_lines(tmp_path, problems)
    assert [(r["kind"], r["step"]) for r in found] == [("evaluation", 0), ("update", 1), ("update", 2), ("evaluation", 2), ("update", 3)]
    assert problems == [
        "metrics.jsonl: the last line (4) is cut off, as after a crash; left out.",
        "evaluations.jsonl: line 4 is not an object; left out.",
    ]
    tail = MetricsTail(tmp_path / "metrics.jsonl", tmp_path / "evaluations.jsonl")
    assert tail.read() == found
    append(tmp_path / "evaluations.jsonl", json.dumps({"kind": "evaluation", "step": 3, "time": 40}).encode() + b"\n")
    assert steps(tail.read()) == [3]


def test_a_clock_that_is_set_back_does_not_change_the_order_of_a_file(tmp_path: Path) -> None:
    append(tmp_path / "metrics.jsonl", line(1, time=50) + line(2, time=10) + line(3, time=60))
    append(tmp_path / "evaluations.jsonl", b'{"kind": "evaluation", "step": 9, "time": 55}\n')
    assert steps(read_lines(tmp_path)) == [1, 2, 9, 3]
