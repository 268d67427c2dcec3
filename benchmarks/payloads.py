"""A group written by members and read by slices, against raw Redis values and raw files of the same bytes, side by side.

    python -m benchmarks.payloads [--json | --markdown] [--megabytes 256] [--repeats 5] [--quick] [--folder FOLDER]

One writer and two reader processes on one machine. Ours: the writer commits a group of 8 members (digests, parts, ledger entry), each
reader reads its half of the members and verifies every block. Raw: the writer sets each member as one value (or writes and syncs it as one
file), each reader gets the same half. Both Redis sides use one server and its append-only file, both file sides one folder. Sides take
turns; a ratio is raw seconds over ours, within a repeat.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.machine import machine
from benchmarks.markdown import figure, table
from benchmarks.stats import interleaved, spread
from replay.buffer import BufferSettings, ClaimedGroup, ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from replay.payloads import make_payloads

MEMBERS, READERS = 8, 2
DEADLINE_S = 300.0
SIDES = {"replay, Redis": "raw Redis", "replay, folder": "raw files"}
"""Ours → what it is held against."""


def reader(pipe: Connection, url: str, place: str) -> None:
    """A process that reads what it is told, until it is told None; answers how many bytes it read."""
    client = connect(url)
    settings = BufferSettings(groups_per_step=1)
    buffers = {side: ReplayBuffer(client, run, settings, make_payloads(where, client, run, settings)) for side, run, where in _runs(place)}
    while (order := pipe.recv()) is not None:
        kind, what = order
        found: Sequence[Any]
        if kind == "raw Redis":
            found = [client.get(key) for key in what]
        elif kind == "raw files":
            found = [Path(file).read_bytes() for file in what]
        else:
            found = buffers[kind].read(*what)
        pipe.send(sum(map(len, found)))


def _runs(place: str) -> tuple[tuple[str, str, str], ...]:
    """(side, run, where its payloads are) of ours."""
    return ("replay, Redis", "bench-redis", "redis"), ("replay, folder", "bench-folder", place)


@contextmanager
def readers(url: str, place: str) -> Iterator[list[Connection]]:
    """Processes that end with the block."""
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for _ in range(READERS):
        here, there = context.Pipe()
        processes.append(context.Process(target=reader, args=(there, url, place), daemon=True))
        processes[-1].start()
        pipes.append(here)
    try:
        yield pipes
    finally:
        for pipe, process in zip(pipes, processes, strict=True):
            pipe.send(None)
            process.join(10)


def all_read(pipes: list[Connection], orders: list[Any]) -> int:
    """Send an order to each reader and wait for all."""
    for pipe, order in zip(pipes, orders, strict=True):
        pipe.send(order)
    total = 0
    for pipe in pipes:
        assert pipe.poll(DEADLINE_S), f"a reader did not answer within {DEADLINE_S:.0f} s"
        total += pipe.recv()
    return total


class Ours:
    """Commit, claim, read by halves; then settled, so that nothing of it is left for the next side."""

    def __init__(self, side: str, buffer: ReplayBuffer, members: list[bytes], pipes: list[Connection]) -> None:
        self.side, self.buffer, self.members, self.pipes = side, buffer, members, pipes
        buffer.initialise()
        self.epoch, self.step = buffer.rollback(0), 0

    def __call__(self) -> Mapping[str, float]:
        self.step += 1
        lease = self.buffer.lease("bench", DEADLINE_S)
        assert lease is not None
        began = time.perf_counter()
        assert self.buffer.commit(lease, [b"head", *self.members], [0.0, 1.0], self.step - 1)
        written = time.perf_counter()
        group: ClaimedGroup = self.buffer.claim(self.step, self.epoch, DEADLINE_S).groups[0]
        claimed = time.perf_counter()
        total = all_read(self.pipes, [(self.side, (group, [1 + m for m in half])) for half in halves()])
        done = time.perf_counter()
        assert total == sum(map(len, self.members))
        self.buffer.publish(self.step, self.epoch)
        self.buffer.settle(self.step, self.epoch)
        return _seconds(written - began, done - claimed)


def halves() -> list[range]:
    """Members of each reader."""
    return [range(MEMBERS * r // READERS, MEMBERS * (r + 1) // READERS) for r in range(READERS)]


def raw(side: str, members: list[bytes], pipes: list[Connection], names: list[str], write: Callable[[str, bytes], object]) -> Mapping[str, float]:
    """Every member under a name of its own, and read by halves."""
    began = time.perf_counter()
    for name, member in zip(names, members, strict=True):
        write(name, member)
    written = time.perf_counter()
    total = all_read(pipes, [(side, [names[m] for m in half]) for half in halves()])
    done = time.perf_counter()
    assert total == sum(map(len, members))
    return _seconds(written - began, done - written)


def _seconds(write: float, read: float) -> Mapping[str, float]:
    return {"write": write, "read": read, "both": write + read}


def _write_synced(name: str, content: bytes) -> None:
    with open(name, "wb", buffering=0) as file:
        assert file.write(content) == len(content)
        os.fsync(file.fileno())


def measure(url: str, folder: Path, megabytes: int, repeats: int) -> dict[str, Any]:
    """Seconds of each side, and ours against raw."""
    size = megabytes * 1_000_000 // MEMBERS
    members = [random.Random(m).randbytes(size) for m in range(MEMBERS)]
    client, place = connect(url), str(folder / "payloads")
    settings = BufferSettings(groups_per_step=1, max_staleness=0, max_bytes=4 * size * MEMBERS + (1 << 20))
    with readers(url, place) as pipes:
        sides: dict[str, Callable[[], Mapping[str, float]]] = {
            side: Ours(side, ReplayBuffer(client, run, settings, make_payloads(where, client, run, settings)), members, pipes)
            for side, run, where in _runs(place)
        }
        keys, files = [f"raw:{m}" for m in range(MEMBERS)], [str(folder / f"raw-{m}") for m in range(MEMBERS)]

        def in_redis() -> Mapping[str, float]:
            found = raw("raw Redis", members, pipes, keys, client.set)
            client.unlink(*keys)
            return found

        def in_files() -> Mapping[str, float]:
            found = raw("raw files", members, pipes, files, _write_synced)
            for file in files:
                os.unlink(file)
            return found

        seconds = interleaved(sides | {"raw Redis": in_redis, "raw files": in_files}, repeats)
    total = size * MEMBERS / 1e6
    rows = [{"side": side, **{what: spread([total / s for s in values]) for what, values in found.items()}} for side, found in seconds.items()]
    for row in rows:
        if row["side"] in SIDES:
            ours, base = seconds[row["side"]], seconds[SIDES[row["side"]]]
            row |= {f"ratio {what}": spread([b / o for b, o in zip(base[what], ours[what], strict=True)]) for what in ours}
    return {"megabytes": total, "members": MEMBERS, "readers": READERS, "rows": rows}


def markdown(found: dict[str, Any]) -> str:
    """The figures as a table."""
    head = ["", "write MB/s", "read MB/s", "ours / raw, write", "read", "together"]
    rows = []
    for r in found["rows"]:
        ratios = [figure(r[f"ratio {what}"], 2) if f"ratio {what}" in r else "–" for what in ("write", "read", "both")]
        rows.append([r["side"], figure(r["write"]), figure(r["read"]), *ratios])
    return f"{found['megabytes']:.0f} MB in {found['members']} members, one writer, {found['readers']} readers.\n\n" + table(head, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Payloads by member and by slice against raw Redis and raw files.")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="figures as JSON")
    form.add_argument("--markdown", action="store_true", help="a Markdown table (the default)")
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="16 MB, twice: only that it runs")
    parser.add_argument("--folder", type=Path, help="where files and the server's log lie [default: a temporary folder]")
    given = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory(prefix="ddrl-bench-", dir=given.folder) as folder, EmbeddedRedis.start(Path(folder) / "redis") as server:
        found = measure(server.url, Path(folder), 16 if given.quick else given.megabytes, 2 if given.quick else given.repeats)
    if given.json:
        print(json.dumps({"machine": about, "quick": given.quick, **found}))
    else:
        print(f"{about['cores']} cores ({about['processor']}), load average {about['load_at_start']} before, Python {about['python']}. {markdown(found)}")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
