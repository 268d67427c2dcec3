"""SIGKILL at every seam of the running pipeline; each run must end with the same promises kept.

The points are in `tests.chaos.points`; every test asserts from what the ledger said at the kill that the point was
reached. Real Ray, Redis, Serve OCR and FSDP ranks throughout.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from replay.embedded import EmbeddedRedis
from tests.chaos.conftest import UPDATES, ChaosRun
from tests.chaos.points import fired, plan
from tests.pipeline import ROOT, check_ledger


def finish(run: ChaosRun, kills: int) -> dict[str, dict[str, object]]:
    """Wait for a good end; returns the evidence of the kills, of which there were `kills`."""
    run.succeed()
    assert run.leftovers() == []
    seen = fired(run.kills)
    assert len(seen) == kills, seen.keys()
    return seen


@pytest.mark.long
def test_producers_and_scorer(start: Callable[..., ChaosRun], tmp_path: Path) -> None:
    """Generator before its payload, between payload and ledger entry, and after the commit; feeder before and after its
    commit; OCR replica in the middle of a batch: all in one run."""
    points = ("generator before payload", "generator after payload", "generator after commit", "feeder before commit", "feeder after commit", "scorer in batch")
    for point in points:
        plan(tmp_path / "run.kills", point, after=2)
    seen = finish(start("run"), kills=len(points))

    before, between, after = (seen[f"generator-{p}"] for p in ("before-payload", "after-payload", "after-commit"))
    assert "ref" not in before["record"]
    assert before["payload"] is False
    assert "ref" not in between["record"]
    assert between["payload"] is True
    assert after["record"]["ref"]
    assert after["payload"] is True
    assert "ref" not in seen["feeder-before-commit"]["record"]
    assert seen["feeder-after-commit"]["record"]["ref"]
    assert "ServeReplica" in str(seen["scorer-in-batch"]["process"])
    check_ledger(tmp_path / "run", UPDATES)


@pytest.mark.long
@pytest.mark.parametrize(
    ("point", "rank", "step", "resumed_from"),
    [
        ("rank after claim", 1, 4, 2),
        ("rank after training", 0, 4, 2),  # the weights exist, the checkpoint does not
        ("rank after report", 0, 4, 2),  # `report` has returned, Ray Train has registered nothing yet
        ("rank after report", 1, 6, 4),
    ],
)
def test_learner_rank(start: Callable[..., ChaosRun], tmp_path: Path, point: str, rank: int, step: int, resumed_from: int) -> None:
    name = plan(tmp_path / "run.kills", point, step=step, rank=rank)
    seen = finish(start("run"), kills=1)[name]
    assert seen["claim"]["groups"]  # claimed, and not settled
    meta = seen["meta"]
    assert int(meta["claimed_step"]) == step
    assert int(meta["settled_step"]) == resumed_from
    assert int(meta["version"]) == (step - 1 if point == "rank after claim" else step)
    counts = check_ledger(tmp_path / "run", UPDATES)
    assert counts["epoch"] == 2


@pytest.mark.long
@pytest.mark.parametrize(("point", "rank"), [("rank before writing", 1), ("rank while writing", 0), ("rank after writing", 1)])
def test_learner_rank_while_it_writes(start: Callable[..., ChaosRun], tmp_path: Path, point: str, rank: int) -> None:
    """The checkpoint of step 4 is staged and the ranks may have claimed step 5; that of step 2 is registered, and where the run goes on."""
    name = plan(tmp_path / "run.kills", point, step=4, rank=rank)
    seen = finish(start("run"), kills=1)[name]
    assert seen["claim"]["groups"]
    assert int(seen["meta"]["settled_step"]) == 2
    assert int(seen["meta"]["version"]) >= 4
    files = set(seen["files"])
    if point == "rank before writing":
        assert f"__{rank}_0.distcp" not in files
    else:
        assert f"__{rank}_0.distcp" in files
        assert (".metadata" in files) == (point == "rank after writing")
    assert check_ledger(tmp_path / "run", UPDATES)["epoch"] == 2
    assert sorted(f.name for f in (tmp_path / "run" / "checkpoints").glob("step-*")) == ["step-000004", "step-000006"]


@pytest.mark.long
def test_driver(start: Callable[..., ChaosRun], tmp_path: Path) -> None:
    """The whole process tree of a run loses its head; the same command with --resume goes on. Payloads lie in a folder."""
    payloads = tmp_path / "payloads"
    place = ("--set", f"replay.payloads={payloads}")
    run = start("run", *place)
    run.wait_for(lambda: run.updates() >= 3, "an update after the first checkpoint")
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait(10)
    assert run.leftovers() == []
    assert list(payloads.rglob("g[0-9]*-*"))
    again = start("run", *place, "--resume")
    finish(again, kills=0)
    assert check_ledger(tmp_path / "run", UPDATES)["epoch"] >= 2
    settled = [file.name for file in payloads.rglob("g[0-9]*-*") if int(file.name[1:].split("-")[0]) < UPDATES * 4]
    assert len(settled) <= 2, settled  # what the kill left half done: at most one per generator, swept once it is old


@pytest.mark.long
def test_redis_server(start: Callable[..., ChaosRun], tmp_path: Path) -> None:
    """Twice; each time it comes back from its append-only file, and nobody notices but by waiting."""
    run = start("run")
    killed = []
    for update in (1, 3):
        run.wait_for(lambda update=update: run.updates() >= update, f"update {update}")
        run.family.clear()  # the server that was killed before is another process
        killed.append(run.kill("redis-server 127.0.0.1"))
    assert len(set(killed)) == 2
    finish(run, kills=0)
    assert check_ledger(tmp_path / "run", UPDATES)["epoch"] == 1


@pytest.mark.long
def test_global_control_store(start: Callable[..., ChaosRun], tmp_path: Path) -> None:
    """Ray's GCS, which keeps its tables in a Redis of its own, is killed and started again under the run."""
    with EmbeddedRedis.start(tmp_path / "ray-redis") as tables:
        folder = tempfile.mkdtemp(prefix="ray")
        head = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.head", tables.url, folder],
            cwd=ROOT,
            env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": str(ROOT)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert head.stdin is not None
        assert head.stdout is not None
        try:
            address = head.stdout.readline().strip()
            assert address, "the cluster did not start"
            with EmbeddedRedis.start(tmp_path / "run-redis") as server:
                arguments = ("--ray-address", address, "--set", f"redis.url={server.url}")
                run = start("run", *arguments, environment={"RAY_AUTH_MODE": "disabled"})
                run.wait_for(lambda: run.updates() >= 1, "the first update")
                gcs = [p for p in psutil.Process(head.pid).children(recursive=True) if p.name().startswith("gcs_server")]
                print("kill", file=head.stdin, flush=True)
                psutil.wait_procs(gcs, 20)
                assert gcs
                assert not gcs[0].is_running()
                time.sleep(2)
                print("start", file=head.stdin, flush=True)
                finish(run, kills=0)
                check_ledger(tmp_path / "run", UPDATES, url=server.url)
        finally:
            head.stdin.close()
            head.wait(60)
