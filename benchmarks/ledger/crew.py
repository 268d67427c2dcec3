"""A crew of real processes on one ledger: some producers, each with several threads, and one learner.

Every process is told when to begin, runs for a given time, and reports what it saw as one line of JSON.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.stats import percentile
from replay.buffer import BufferSettings, ReplayBuffer
from replay.connect import connect

ROOT = Path(__file__).resolve().parents[2]
RUNS = itertools.count()
TINY = b"x" * 64
PATIENCE_S = 60.0


def settings(groups_per_step: int) -> BufferSettings:
    """Slots for eight steps: producers are held up by the ledger's speed, not by its staleness bound."""
    return BufferSettings(groups_per_step=groups_per_step, max_staleness=7)


def work(url: str, processes: int, threads: int, seconds: float, groups_per_step: int, pace_s: float = 0.0) -> dict[str, Any]:
    """Run `processes` x `threads` producers and a learner for `seconds`; rates and latencies (ms).

    `pace_s` > 0: a producer begins a group every `pace_s` seconds, as one that also samples would; else at once.
    """
    run = f"crew{next(RUNS)}"
    client = connect(url)
    buffer = ReplayBuffer(client, run, settings(groups_per_step))
    buffer.initialise()
    epoch = buffer.rollback(0)
    jobs: list[dict[str, Any]] = [{"role": "learner", "epoch": epoch}]
    jobs += [{"role": "producer", "index": i, "threads": threads, "pace_s": pace_s, "of": processes * threads} for i in range(processes)]
    crew = [_start(url, {"run": run, "seconds": seconds, "groups_per_step": groups_per_step, **job}) for job in jobs]
    try:
        for process in crew:
            assert process.stdout is not None
            if process.stdout.readline() != "ready\n":
                raise SystemExit(f"a benchmark process did not start:\n{process.communicate(timeout=10)[1]}")
        for process in crew:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        found = []
        for process in crew:
            out, err = process.communicate(timeout=seconds + PATIENCE_S)
            if process.returncode != 0:
                raise SystemExit(f"a benchmark process failed:\n{err}")
            found.append(json.loads(out))
    finally:
        for process in crew:
            if process.poll() is None:
                process.kill()
                process.wait()
    findings = buffer.audit()
    client.close()
    if findings:
        raise SystemExit(f"the ledger does not pass its audit: {findings[:3]}")
    learner, makers = found[0], found[1:]
    latencies = {name: [ms for maker in makers for ms in maker[name]] for name in ("lease_ms", "commit_ms")}
    return {
        "producers": processes * threads,
        "processes": processes,
        "groups/s": learner["settled"] / learner["seconds"],
        "waits": sum(maker["waits"] for maker in makers),
        **{f"{name} {share}": percentile(values, share) for name, values in latencies.items() for share in (0.5, 0.99)},
    }


def _start(url: str, order: dict[str, Any]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.ledger.crew", json.dumps(order)],
        cwd=ROOT,
        env=os.environ | {"DDRL_BENCH_URL": url},  # not an argument: it holds the password
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def produce(buffer: ReplayBuffer, name: str, until: float, pace_s: float, offset_s: float, log: dict[str, Any]) -> None:
    """One producer: lease, commit, again."""
    due = time.monotonic() + offset_s
    while time.monotonic() < until:
        if pace_s:
            time.sleep(max(0.0, due - time.monotonic()))
            due = max(due + pace_s, time.monotonic())
        begin = time.perf_counter()
        lease = buffer.lease(name, 0)
        leased = time.perf_counter()
        if lease is None:  # no slot: the learner is behind
            log["waits"] += 1
            time.sleep(0.002)
            continue
        buffer.commit(lease, TINY, [0.0, 1.0], lease.min_version)
        log["lease_ms"].append(1e3 * (leased - begin))
        log["commit_ms"].append(1e3 * (time.perf_counter() - leased))


def make(buffer: ReplayBuffer, seconds: float, index: int, threads: int, pace_s: float, of: int) -> dict[str, Any]:
    """All producers of one process."""
    until = time.monotonic() + seconds
    logs: list[dict[str, Any]] = [{"lease_ms": [], "commit_ms": [], "waits": 0} for _ in range(threads)]
    crew = [
        threading.Thread(target=produce, args=(buffer, f"p{index}-{i}", until, pace_s, pace_s * (index * threads + i) / of, log)) for i, log in enumerate(logs)
    ]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    return {
        "lease_ms": [ms for log in logs for ms in log["lease_ms"]],
        "commit_ms": [ms for log in logs for ms in log["commit_ms"]],
        "waits": sum(log["waits"] for log in logs),
    }


def learn(buffer: ReplayBuffer, seconds: float, epoch: int) -> dict[str, Any]:
    """Claim, publish and settle as fast as groups come; the rate counts whole steps between the first and the last."""
    until = time.monotonic() + seconds
    step = settled = 0
    began = ended = time.perf_counter()
    while time.monotonic() < until:
        if buffer.counts()["ready"] < buffer.settings.groups_per_step:
            time.sleep(0.001)
            continue
        groups = buffer.claim(step + 1, epoch, 5).groups
        step += 1
        buffer.publish(step, epoch)
        buffer.settle(step, epoch)
        if step == 1:
            began = time.perf_counter()
        else:
            settled += len(groups)
        ended = time.perf_counter()
    return {"settled": settled, "seconds": max(ended - began, 1e-9)}


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    buffer = ReplayBuffer(connect(os.environ["DDRL_BENCH_URL"]), order.pop("run"), settings(order.pop("groups_per_step")))
    buffer.counts()
    role, seconds = order.pop("role"), order.pop("seconds")
    print("ready", flush=True)
    if sys.stdin.readline() != "go\n":
        return
    print(json.dumps(learn(buffer, seconds, **order) if role == "learner" else make(buffer, seconds, **order)), flush=True)


if __name__ == "__main__":
    main()
