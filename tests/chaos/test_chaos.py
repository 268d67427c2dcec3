"""A seeded storm of SIGKILLs over the whole pipeline; afterwards the ledger must add up. `make test-chaos` runs it.

DDRL_CHAOS_SEED and DDRL_CHAOS_KILLS choose another storm. Every kill is written to `chaos.jsonl` in the run folder.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable

import psutil
import pytest

from tests.chaos.conftest import ChaosRun
from tests.pipeline import ROOT, check_ledger, command, settings

SEED = int(os.environ.get("DDRL_CHAOS_SEED", "0"))
KILLS = int(os.environ.get("DDRL_CHAOS_KILLS", "50"))
DEADLINE_S = 3600.0

# title of the process, weight in the draw, seconds it needs at least before it may be killed again
TARGETS = {
    "generator": ("ray::RolloutGenerator", 20, 2.0),
    "feeder": ("ray::AnchorFeeder", 6, 4.0),
    "scorer": ("ray::ServeReplica:rewards", 6, 10.0),
    "weight store": ("ray::WeightStore", 4, 8.0),
    "redis": ("redis-server 127.0.0.1", 6, 8.0),
    "learner rank": ("ray::RayTrainWorker", 3, 30.0),
    "driver": ("", 1, 120.0),
}


LASTING = (
    "updates=100000",
    "rollout.generators=3",
    "replay.max_staleness=1",
    "replay.max_attempts=50",
    "learner.max_failures=1000",
    "max_dead_groups=1000",
)


class Storm:
    """Draws targets and kills them, while the run goes on.

    Args:
        start: starts a run.
    """

    def __init__(self, start: Callable[..., ChaosRun]) -> None:
        self.rng, self.start = random.Random(SEED), start
        self.killed: collections.Counter[str] = collections.Counter()
        self.last = dict.fromkeys(TARGETS, 0.0)
        self.run = self.launch()

    def launch(self, *arguments: str) -> ChaosRun:
        run = self.start("run", *settings(*LASTING), *arguments)
        before = run.updates()
        run.wait_for(lambda: run.updates() > before, "an update")
        return run

    def strike(self) -> None:
        """Kill one process; a target that is not up just now, or was killed a moment ago, is passed over."""
        name = self.rng.choices(list(TARGETS), [weight for _, weight, _ in TARGETS.values()])[0]
        title, _, pause = TARGETS[name]
        if time.monotonic() - self.last[name] < pause:
            return
        if name == "driver":
            os.kill(self.run.process.pid, signal.SIGKILL)
            self.run.process.wait(10)
            assert self.run.leftovers() == []
            self.note(name, self.run.process.pid)
            self.run = self.launch("--resume")
            return
        alive = [p for p in psutil.Process(self.run.process.pid).children(recursive=True) if title in _title(p)]
        if alive:
            victim = self.rng.choice(alive)
            os.kill(victim.pid, signal.SIGKILL)
            self.note(name, victim.pid)

    def note(self, name: str, pid: int) -> None:
        self.killed[name] += 1
        self.last[name] = time.monotonic()
        with (self.run.folder / "chaos.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "killed": name, "pid": pid, "updates": self.run.updates()}) + "\n")


def _title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.mark.chaos
def test_storm(start: Callable[..., ChaosRun]) -> None:
    storm = Storm(start)
    end = time.monotonic() + DEADLINE_S
    while sum(storm.killed.values()) < KILLS:
        assert time.monotonic() < end, storm.killed
        if storm.run.process.poll() is not None:
            out, err = storm.run.process.communicate(timeout=30)
            pytest.fail(f"the run ended by itself after {dict(storm.killed)}; exit {storm.run.process.returncode}\n{out[-3000:]}\n{err[-3000:]}")
        storm.run.remember_family()
        storm.strike()
        time.sleep(storm.rng.uniform(0.5, 3.0))
    run, calm = storm.run, storm.run.updates() + 3
    run.wait_for(lambda: run.updates() >= calm, "updates after the storm")
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.finish()
    assert code == 130, (out, err)
    assert run.leftovers() == []

    counts = check_ledger(run.folder, run.updates())
    audit = subprocess.run(command("replay", "audit", str(run.folder)), cwd=ROOT, text=True, capture_output=True, timeout=120, check=False)
    assert audit.returncode == 0, audit.stdout + audit.stderr
    print(f"\nseed {SEED}: {sum(storm.killed.values())} kills {dict(storm.killed)}, {run.updates()} updates\n{counts}\n{audit.stdout}")
