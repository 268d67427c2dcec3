"""Kill points: places in a running pipeline where a process sends itself SIGKILL, once, by a plan in a folder.

The code under test knows nothing of this. Ray runs `install` in every worker process before anything else (its
worker_process_setup_hook); it wraps the methods at the seams (buffer, ledger, Ray Train's report, scorer results), and a
wrapper whose turn has come writes down what the ledger says at that instant, then kills its process. Tests assert from
that evidence that the point was reached.

A plan is a folder with one JSON file per kill, `<name>.plan`: {"point": …, "pass": n, "step": s, "rank": r}. A kill
happens in the first process that gets there; it leaves `<name>.fired` behind (created exclusively), so it happens once.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FOLDER = "DDRL_KILL_PLAN"

POINTS = (
    "generator before payload",
    "generator after payload",
    "generator after commit",
    "feeder before commit",
    "feeder after commit",
    "scorer in batch",
    "rank after claim",
    "rank after training",
    "rank after report",
    "rank before writing",
    "rank while writing",
    "rank after writing",
)


def plan(folder: Path, point: str, after: int = 1, step: int | None = None, rank: int | None = None) -> str:
    """Add a kill to a plan: at the `after`-th pass of one process over `point` (of those at `step`, in `rank`)."""
    assert point in POINTS, point
    folder.mkdir(parents=True, exist_ok=True)
    name = point.replace(" ", "-") + ("" if step is None else f"-{step}") + ("" if rank is None else f"-rank{rank}")
    (folder / f"{name}.plan").write_text(json.dumps({"point": point, "pass": after, "step": step, "rank": rank}))
    return name


def fired(folder: Path) -> dict[str, dict[str, Any]]:
    """What the ledger said at each kill that happened, by name."""
    return {f.stem: json.loads(f.read_text()) for f in folder.glob("*.fired")}


class Plan:
    """The kills of this process's run; counts the passes of this process."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.kills = {f.stem: json.loads(f.read_text()) for f in folder.glob("*.plan")}
        self.passes = dict.fromkeys(self.kills, 0)

    def reached(self, point: str, evidence: Callable[[], dict[str, Any]], step: int | None = None, rank: int | None = None) -> None:
        """Die here if the plan says so and nobody has yet."""
        for name, kill in self.kills.items():
            if kill["point"] != point or kill["step"] not in (None, step) or kill["rank"] not in (None, rank):
                continue
            self.passes[name] += 1
            if self.passes[name] < kill["pass"] or (self.folder / f"{name}.fired").exists():
                continue
            seen = json.dumps({"pid": os.getpid(), "step": step, "rank": rank, **evidence()})
            draft = self.folder / f"{name}.{os.getpid()}"
            draft.write_text(seen)
            try:
                os.link(draft, self.folder / f"{name}.fired")  # fails when another process was first
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)


def install() -> None:
    """Wrap the seams in this worker process. Imports only what is light."""
    chosen = Plan(Path(os.environ[FOLDER]))
    wrap_buffer(chosen)
    wrap_results(chosen)


def record(buffer: Any, key: str) -> dict[str, str]:
    """A record of the ledger as it stands."""
    ledger = buffer._ledger
    return {k.decode(): v.decode(errors="replace") for k, v in ledger._client.hgetall(ledger.prefix + key).items()}


def group_evidence(buffer: Any, group: int, ref: str) -> dict[str, Any]:
    ledger = buffer._ledger
    return {"group": group, "record": record(buffer, f"group:{group}"), "payload": bool(ledger._client.exists(f"{ledger.prefix}payload:{ref}"))}


def step_evidence(buffer: Any, step: int) -> dict[str, Any]:
    return {"claim": record(buffer, f"claim:{step}"), "meta": {k: v for k, v in record(buffer, "meta").items() if v.lstrip("-").isdigit()}}


def wrap_buffer(chosen: Plan) -> None:
    """Points of generators, feeder and learner ranks that lie at the replay buffer."""
    from replay.buffer import ReplayBuffer
    from replay.ledger import Ledger

    commit, entry, commit_data, claim = ReplayBuffer.commit, Ledger.commit, ReplayBuffer.commit_data, ReplayBuffer.claim
    writing: list[ReplayBuffer] = []

    @functools.wraps(commit)
    def committing(self: Any, lease: Any, *args: Any, **options: Any) -> bool:
        ref = f"g{lease.group}-{lease.token}"
        chosen.reached("generator before payload", lambda: group_evidence(self, lease.group, ref))
        writing.append(self)
        try:
            accepted = commit(self, lease, *args, **options)
        finally:
            writing.pop()
        if accepted:
            chosen.reached("generator after commit", lambda: group_evidence(self, lease.group, ref))
        return accepted

    @functools.wraps(entry)
    def entering(self: Any, lease: Any, *args: Any) -> Any:
        def evidence() -> dict[str, Any]:
            args[-1].execute()  # the payload alone; the ledger entry never follows
            return group_evidence(writing[-1], lease.group, f"g{lease.group}-{lease.token}")

        chosen.reached("generator after payload", evidence)
        return entry(self, lease, *args)

    @functools.wraps(commit_data)
    def feeding(self: Any, batch: int, payload: bytes, *args: Any) -> None:
        chosen.reached("feeder before commit", lambda: {"batch": batch, "record": record(self, f"data:{batch}")})
        commit_data(self, batch, payload, *args)
        chosen.reached("feeder after commit", lambda: {"batch": batch, "record": record(self, f"data:{batch}")})

    @functools.wraps(claim)
    def claiming(self: Any, step: int, *args: Any, **options: Any) -> Any:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        if not hasattr(ray.train.report, "kill_point"):
            wrap_report(chosen, self)
        result = claim(self, step, *args, **options)
        chosen.reached("rank after claim", lambda: step_evidence(self, step), step, rank)
        return result

    ReplayBuffer.commit, Ledger.commit = committing, entering  # type: ignore[method-assign]
    ReplayBuffer.commit_data, ReplayBuffer.claim = feeding, claiming  # type: ignore[method-assign]


def wrap_report(chosen: Plan, buffer: Any) -> None:
    """Points of a learner rank around Ray Train's report, and in the thread that writes what was reported: before it begins, when the
    rank's shards are on disk and their table is not, and when everything is."""
    import ray.train
    from torch.distributed.checkpoint import FileSystemWriter

    report, write_data = ray.train.report, FileSystemWriter.write_data
    rank = ray.train.get_context().get_world_rank()

    def passing(point: str, folder: Path) -> None:
        step = int(folder.name.removeprefix("step-"))
        chosen.reached(point, lambda: step_evidence(buffer, step) | {"files": sorted(f.name for f in folder.glob("*"))}, step, rank)

    @functools.wraps(write_data)
    def writing(self: Any, *args: Any) -> Any:
        written = write_data(self, *args)
        written.wait()
        passing("rank while writing", Path(self.path))
        return written

    @functools.wraps(report)
    def reporting(metrics: dict[str, Any], *, checkpoint: Any, checkpoint_upload_fn: Callable[..., Any], **options: Any) -> None:
        def uploading(*args: Any) -> Any:
            passing("rank before writing", Path(checkpoint.path))
            made = checkpoint_upload_fn(*args)
            passing("rank after writing", Path(checkpoint.path))
            return made

        step = int(metrics["step"])
        chosen.reached("rank after training", lambda: step_evidence(buffer, step), step, rank)
        report(metrics, checkpoint=checkpoint, checkpoint_upload_fn=uploading, **options)
        chosen.reached("rank after report", lambda: step_evidence(buffer, step), step, rank)

    reporting.kill_point = True  # type: ignore[attr-defined]
    ray.train.report, FileSystemWriter.write_data = reporting, writing  # type: ignore[method-assign]


def wrap_results(chosen: Plan) -> None:
    """A scorer replica in the middle of a batch: it has scored some items and answered none."""
    from services.contract import ItemScore

    made = ItemScore.__post_init__

    def making(self: Any) -> None:
        made(self)
        if "ServeReplica" in " ".join(sys.argv) or "ServeReplica" in _title():
            chosen.reached("scorer in batch", lambda: {"process": _title()})

    ItemScore.__post_init__ = making  # type: ignore[method-assign]


def _title() -> str:
    return Path("/proc/self/cmdline").read_bytes().replace(b"\0", b" ").decode()
