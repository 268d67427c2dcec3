"""The run folder: one run at a time, nothing lost by a refusal."""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.weights.table import Shard
from actors.weights.transport import FolderTransport
from trainer.config.errors import ConfigError
from trainer.config.load import load_config, parse_config
from trainer.config.run import RunConfig
from trainer.learn.records import append_metrics, drop_metrics_after
from trainer.run.folder import RunFolder

CONFIG = parse_config({"seed": 3})

HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "a+")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def started(tmp_path: Path) -> Path:
    """The folder of a run that has ended."""
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.open(CONFIG, resume=False)
    append_metrics(folder.path, {"kind": "update", "step": 1})
    folder.close()
    return folder.path


def register(path: Path, step: int) -> None:
    """Ray Train's note of the newest registered checkpoint."""
    (path / "checkpoints").mkdir(exist_ok=True)
    newest = {"checkpoint_dir_name": f"step-{step:06d}", "metrics": {"step": step}}
    (path / "checkpoints" / "checkpoint_manager_snapshot.json").write_text(json.dumps({"latest_checkpoint_result": newest}))


def refused(path: Path, resume: bool, config: RunConfig = CONFIG) -> str:
    folder = RunFolder(path)
    with pytest.raises(ConfigError) as error:
        folder.open(config, resume)
    folder.close()
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_new_folder_holds_the_resolved_configuration_and_the_process_id(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "runs" / "a")
    folder.open(CONFIG, resume=False)
    assert load_config(folder.path / "config.yaml") == CONFIG
    assert (folder.path / "lock").read_text() == f"{os.getpid()}\n"
    folder.close()
    folder.close()  # twice is harmless


def test_a_folder_with_a_run_needs_resume(started: Path) -> None:
    message = refused(started, resume=False)
    assert str(started) in message
    assert "already holds a run; add --resume" in message
    folder = RunFolder(started)
    folder.open(CONFIG, resume=True)
    folder.close()


def test_nothing_to_resume(tmp_path: Path) -> None:
    message = refused(tmp_path / "none", resume=True)
    assert "nothing to resume" in message
    assert "holds no run; start it without --resume" in message
    assert not (tmp_path / "none").exists()


def test_weights_of_another_run_in_a_shared_folder_are_not_touched(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"weights": CONFIG.weights.model_copy(update={"path": str(tmp_path / "weights")})})
    transport = FolderTransport(str(tmp_path / "weights" / config.name))
    first = RunFolder(tmp_path / "first")
    first.open(config, resume=False)
    assert first.weights == Path(transport.path)
    transport.remember(Shard(1, 0, 0, 1, ()))
    assert "holds weights of another run of this name; choose another name (--set name=…)" in refused(tmp_path / "second", False, config)
    assert transport.recall() == [Shard(1, 0, 0, 1, ())]
    first.close()
    again = RunFolder(tmp_path / "first")  # it came to nothing: no update was made
    again.open(config, resume=False)
    assert transport.recall() == []
    again.close()


def test_a_folder_another_process_works_in(started: Path) -> None:
    before = (started / "config.yaml").read_text()
    with subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(started / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        changed = parse_config({"seed": 3, "updates": 9})
        assert "is in use by another ddrl process" in refused(started, resume=True, config=changed)
        assert (started / "config.yaml").read_text() == before
        other.communicate("")
    folder = RunFolder(started)
    folder.open(CONFIG, resume=True)  # the lock went with the process
    folder.close()


def test_two_runs_in_one_process_do_not_share_a_folder(started: Path) -> None:
    first = RunFolder(started)
    first.open(CONFIG, resume=True)
    assert "is in use" in refused(started, resume=True)
    first.close()


def test_a_path_that_cannot_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    assert "cannot be written: Not a directory" in refused(tmp_path / "file" / "run", resume=False)
    assert "cannot be written" in refused(Path("/proc/ddrl-run"), resume=False)


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Writes beyond `size` bytes fail in this process, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_on_resume_does_not_cost_the_run(started: Path) -> None:
    with files_of_at_most(16):
        message = refused(started, resume=True)
    assert "cannot be written" in message
    folder = RunFolder(started)
    folder.open(CONFIG, resume=True)
    folder.close()
    assert load_config(started / "config.yaml") == CONFIG


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 3, "learner": {"updates_per_claim": 2}}, "learner.updates_per_claim"),
        ({"seed": 4}, "seed"),
        ({"seed": 3, "objective": {"data_weight": 0.5}}, "objective.data_weight"),
        ({"seed": 3, "optimizer": {"lr": 1.0}, "sampler": {"steps": 12}}, "optimizer.lr, sampler.steps"),
    ],
)
def test_a_run_goes_on_with_its_own_settings_only(change: dict[str, object], named: str, started: Path) -> None:
    message = refused(started, resume=True, config=parse_config(change))
    assert f"was started with other settings ({named})" in message
    assert load_config(started / "config.yaml") == CONFIG


def test_more_updates_and_other_machinery_may_be_given_on_resume(started: Path) -> None:
    config = parse_config({"seed": 3, "updates": 500, "learner": {"ranks": 4}, "redis": {"url": "redis://h:1/0"}, "ray": {"address": "auto"}})
    folder = RunFolder(started)
    folder.open(config, resume=True)
    folder.close()
    assert load_config(started / "config.yaml") == config


# -- metrics --------------------------------------------------------------------------------------------------------


def test_records_come_back_with_the_time_and_without_a_torn_end(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.records() == []
    folder.append_evaluation({"kind": "eval", "step": 1, "text": "é\u2028\n"})
    append_metrics(tmp_path, {"kind": "update", "step": 2})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "upd')
    found = folder.records()
    assert {r["step"]: r.get("text") for r in found} == {1: "é\u2028\n", 2: None}
    assert all(r["time"] > 1e9 for r in found)


def test_a_number_that_is_none_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range float"):
        append_metrics(tmp_path, {"loss": math.nan})
    assert RunFolder(tmp_path).records() == []


def test_updates_after_the_checkpoint_are_forgotten(tmp_path: Path) -> None:
    drop_metrics_after(tmp_path, 2)
    for step in range(1, 6):
        append_metrics(tmp_path, {"kind": "update", "step": step})
    append_metrics(tmp_path, {"kind": "eval", "step": 0})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "update", "st')
    drop_metrics_after(tmp_path, 2)
    assert [(r["kind"], r["step"]) for r in RunFolder(tmp_path).records()] == [("update", 1), ("update", 2), ("eval", 0)]
    append_metrics(tmp_path, {"kind": "update", "step": 3})
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 0, 3]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


# -- starting anew, going on ----------------------------------------------------------------------------------------


def test_a_start_that_never_finished_an_update_costs_no_name(tmp_path: Path) -> None:
    """Also one that got as far as evaluations, a refused self-test and a checkpoint of step 0."""
    folder = RunFolder(tmp_path / "a")
    folder.open(CONFIG, resume=False)
    folder.append_evaluation({"kind": "eval", "step": 0})
    append_metrics(folder.path, {"kind": "self_test", "step": 0, "refused": "gap"})
    (folder.path / "samples").mkdir()
    (folder.path / "samples" / "before.png").write_bytes(b"x")
    register(folder.path, 0)
    folder.mark("failed", "refused", 1)
    folder.close()
    mended = RunFolder(tmp_path / "a")
    mended.open(parse_config({"seed": 4}), resume=False)
    assert mended.leftover
    assert load_config(mended.path / "config.yaml").seed == 4
    assert mended.records() == []
    assert not (mended.path / "samples").exists()
    mended.close()
    again = RunFolder(tmp_path / "a")
    again.open(parse_config({"seed": 4}), resume=True)  # that is possible as well
    assert again.step == 0
    again.close()


def test_a_resume_takes_back_the_earlier_end(started: Path) -> None:
    """No stale summary, nothing of steps after the checkpoint, and nothing twice."""
    register(started, 4)
    for name in ("summary.json", "report.html"):
        (started / name).write_text("{}")
    for folder in ("eval", "samples"):
        (started / folder).mkdir()
    for step in (0, 4, 6):
        (started / "eval" / f"dev-{step:06d}-raw.json").write_text("{}")
        (started / "samples" / f"step-{step:06d}.png").write_bytes(b"x")
    (started / "samples" / "before.png").write_bytes(b"x")
    folder = RunFolder(started)
    for step in (0, 4, 6):
        folder.append_evaluation({"kind": "evaluation", "step": step})
    folder.open(CONFIG, resume=True)
    assert folder.step == 4
    assert not folder.summary.exists()
    assert not (started / "report.html").exists()
    assert sorted(f.name for f in (started / "eval").iterdir()) == ["dev-000000-raw.json", "dev-000004-raw.json"]
    assert sorted(f.name for f in (started / "samples").iterdir()) == ["before.png", "step-000000.png", "step-000004.png"]
    assert [r["step"] for r in folder.records() if r["kind"] == "evaluation"] == [0, 4]
    folder.close()


def test_fewer_updates_than_are_done_are_refused(started: Path) -> None:
    register(started, 4)
    message = refused(started, resume=True, config=parse_config({"seed": 3, "updates": 3}))
    assert "updates=3, but the run has a checkpoint of update 4" in message


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"rewards": {"scene": {}}}, "rewards.ocr, rewards.scene"),
        ({"rewards": {"ocr": {"weight": 2.0}}}, "rewards.ocr"),
        ({"held_out_rewards": ["jpeg"]}, "held_out_rewards"),
        ({"fleet": {"rewards": {"ocr": {"kind": "ocr", "mode": "strict"}}}}, "fleet.rewards"),
        ({"fleet": {"timeout_s": 9.0, "start_timeout_s": 9.0}}, None),
    ],
)
def test_another_reward_is_another_run_and_a_longer_deadline_is_not(changed: dict[str, object], named: str | None, started: Path) -> None:
    config = parse_config({"seed": 3, **changed})
    if named is None:
        folder = RunFolder(started)
        folder.open(config, resume=True)
        folder.close()
    else:
        assert f"was started with other settings ({named})" in refused(started, resume=True, config=config)


def test_the_state_of_a_run_stands_in_its_folder(started: Path) -> None:
    folder = RunFolder(started)
    folder.open(CONFIG, resume=True)
    running = json.loads(folder.state.read_text())
    assert (running["state"], running["pid"], running["ended"], running["exit"]) == ("running", os.getpid(), None, None)
    folder.mark("interrupted", "stopped after update 1", 143)
    folder.mark_end("failed", "later", 1)  # the end is known already
    folder.close()
    ended = json.loads(folder.state.read_text())
    assert (ended["state"], ended["reason"], ended["exit"], ended["step"]) == ("interrupted", "stopped after update 1", 143, 1)
    assert ended["ended"] >= ended["started"]
