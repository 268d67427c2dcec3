"""Runs that are told to stop: by SIGTERM at any time, by a signal to their whole group, by `ray job stop`."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from replay.embedded import EmbeddedRedis
from tests.head import ENVIRONMENT, RAY, head_node, wait_until
from tests.pipeline import REDUCED, ROOT, Run, settings
from trainer.run.resume import registered_step

DEADLINE_S = 30.0
"""Kubernetes kills a pod this long after its SIGTERM."""


def state(folder: Path) -> dict[str, object]:
    return json.loads((folder / "state.json").read_text())


def log(run: Run) -> str:
    """What Ray's libraries and the stages of the run have said so far."""
    return (run.folder / "state.json").read_text() if (run.folder / "state.json").exists() else ""


def told(run: Run, number: int = signal.SIGTERM, group: bool = False) -> tuple[int, str, str]:
    """Signal the run; how it ended, which must be within the deadline."""
    began = time.monotonic()
    if group:
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    code, out, err = run.finish()
    assert time.monotonic() - began < DEADLINE_S, (out, err)
    assert "Traceback" not in out + err
    assert "Aborted" not in out + err
    return code, out, err


def test_sigterm_before_ray_is_up(start: Callable[..., Run]) -> None:
    run = start("run")
    run.wait_for(lambda: "running" in log(run), "the folder")
    code, _, err = told(run)
    assert (code, state(run.folder)["state"]) == (143, "interrupted")
    assert "stopped" in err
    assert run.leftovers() == []


@pytest.mark.long
def test_sigterm_while_ray_comes_up(start: Callable[..., Run]) -> None:
    run = start("run")
    run.wait_for(lambda: any("gcs_server" in name for name in run.titles()), "Ray's first process")
    code, _, _ = told(run)
    assert (code, state(run.folder)["state"]) == (143, "interrupted")
    assert run.leftovers() == []


@pytest.mark.long
def test_sigterm_in_mid_update_leaves_a_checkpoint_and_the_run_goes_on(start: Callable[..., Run]) -> None:
    """To the whole group, as `timeout` does, which must not shoot Ray before the checkpoint."""
    run = start("run", "--set", "checkpoint_every=100", "--set", "evaluation.every=0", "--set", "updates=100")
    run.wait_for(lambda: run.updates() >= 1, "an update")
    code, _, err = told(run, group=True)
    done = run.updates()
    assert code == 143
    assert "--resume" in err
    assert registered_step(run.folder / "checkpoints") == done
    assert state(run.folder) | {"state": "interrupted", "exit": 143, "step": done} == state(run.folder)
    assert run.leftovers() == []
    again = start("run", "--set", "checkpoint_every=100", "--set", "evaluation.every=0", "--set", f"updates={done + 1}", "--resume")
    code, out, err = again.finish()
    assert code == 0, (out, err)
    assert f"Resuming at update {done} of {done + 1}" in out
    assert f"update {done}/" not in out
    assert "test at 0" not in out
    assert state(run.folder)["state"] == "finished"


@pytest.mark.long
def test_a_sign_of_hacking_ends_the_run_with_a_checkpoint_and_it_goes_on(start: Callable[..., Run]) -> None:
    """A limit that every policy passes stands for a policy that passes a sensible one."""
    rules = ("--set", "hacking.scene_z=1e-9", "--set", "evaluation.every=1", "--set", "checkpoint_every=100")
    run = start("run", *rules, "--set", "hacking.stop=stop", "--set", "updates=100")
    code, out, err = run.finish()
    assert code == 3, (out, err)
    done = run.updates()
    assert "standard deviations of the starting policy's pictures away, limit hacking.scene_z=1e-09; samples/step-000001.png" in out
    assert f"stopped after update {done} of 100; its checkpoint is kept" in err
    assert registered_step(run.folder / "checkpoints") == done
    assert state(run.folder) | {"state": "interrupted", "exit": 3, "step": done} == state(run.folder)
    assert (run.folder / "samples" / "step-000001.png").exists()
    page = (run.folder / "report.html").read_text()
    assert "Sign of reward hacking at update 1, dev prompts" in page
    assert "Update 1: a sign of reward hacking" in page
    assert run.leftovers() == []
    again = start("run", *rules, "--set", "hacking.stop=warn", "--set", f"updates={done + 1}", "--resume")
    code, out, err = again.finish()
    assert code == 0, (out, err)
    assert f"warning at update {done + 1}" in out  # of the last evaluation


@pytest.mark.long
def test_sigterm_in_the_last_evaluation(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "updates=1", "--set", "evaluation.every=0", "--set", "evaluation.test_prompts=400")
    run.wait_for(lambda: registered_step(run.folder / "checkpoints") == 1, "the last checkpoint")
    code, _, _ = told(run)
    assert code == 143
    assert registered_step(run.folder / "checkpoints") == 1
    assert not (run.folder / "summary.json").exists()
    assert run.leftovers() == []


@pytest.mark.long
def test_ray_job_stop_leaves_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with head_node(dashboard=True) as head, EmbeddedRedis.start(tmp_path / "redis") as server:

        def job(verb: str, *arguments: str) -> subprocess.CompletedProcess[str]:
            command = [RAY, "job", verb, "--address", head.jobs, *arguments]
            return subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False)

        # a busy machine may take longer for an update than the 20 and 40 seconds of docs/pitfalls.md
        variables = ENVIRONMENT | {"RAY_JOB_STOP_WAIT_TIME_S": "150"}
        changed = (
            f"redis.url={server.url}",
            f"model.path={ROOT / 'recipes/glyph-base'}",
            "checkpoint_every=100",
            "evaluation.every=0",
            "updates=100",
            "stop_deadline_s=120",
        )
        train = ["train", str(ROOT / "recipes/glyph-ocr.yaml"), "--ray-address", "auto", "--run-dir", str(folder), *settings(*REDUCED, *changed)]
        submit = ["--no-wait", "--submission-id", "mine", "--runtime-env-json", json.dumps({"env_vars": variables}), "--"]
        # the agent that takes jobs comes up after the head answers
        wait_until(lambda: job("submit", *submit, sys.executable, "-m", "trainer", *train).returncode == 0, "the agent for jobs")
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and '"kind": "update"' in metrics.read_text(), "an update", 300)
        job("stop", "--no-wait", "mine")
        wait_until(lambda: "stopped" in job("status", "mine").stdout.lower(), "the end of the job", 180)
        done = metrics.read_text().count('"kind": "update"')
        assert registered_step(folder / "checkpoints") == done
        assert state(folder) | {"state": "interrupted", "exit": 143, "step": done} == state(folder)
