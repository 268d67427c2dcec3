"""A whole run: real Ray, Redis, Serve OCR and FSDP ranks, with processes killed in the middle, at reduced size."""

from __future__ import annotations

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig
from replay.buffer import ReplayBuffer
from replay.connect import connect
from replay.embedded import EmbeddedRedis
from tests.head import ENVIRONMENT, head_node
from tests.pipeline import ROOT, Run, check_ledger, command, records
from trainer.config.load import load_config
from trainer.plan.storage import buffer_settings


def check_finished(folder: Path, updates: int, url: str | None = None) -> None:
    """Everything a finished run leaves behind is there and agrees."""
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["updates"] == updates
    for reward in summary["rewards"].values():
        assert all(isinstance(reward[name], float) for name in ("before", "after", "gain", "stderr"))
    for name in ("diffusion_loss_before", "diffusion_loss_after", "diversity_before", "diversity_after"):
        assert isinstance(summary[name], float), name
    for name in ("samples/before.png", "samples/after.png", "report.html", "config.yaml"):
        assert (folder / name).stat().st_size > 0, name
    assert not re.findall(r'(?:src|href)="https?://', (folder / "report.html").read_text())
    assert list((folder / "tensorboard").glob("events.*"))
    check_ledger(folder, updates, url=url)


def test_run_survives_kills_and_exports_what_diffusers_opens(start: Callable[..., Run]) -> None:
    run = start("run")
    run.wait_for(lambda: run.updates() >= 1, "the first update")
    killed = run.kill("ray::RolloutGenerator")
    run.wait_for(lambda: run.updates() >= 2, "an update after the generator was killed")
    killed_replica = run.kill("ray::ServeReplica:run-glyph-ocr:ocr")
    code, out, err = run.finish()
    assert code == 0, (out, err)
    assert killed != killed_replica
    assert "ocr" in out
    assert "Traceback" not in out + err
    assert run.leftovers() == []
    check_finished(run.folder, 4)

    from diffusers import SD3Transformer2DModel

    folder = run.folder / "exports" / "step-000004"
    theirs = SD3Transformer2DModel.from_pretrained(folder, subfolder="transformer")
    policy = load_policy(ModelConfig(path=str(folder)))
    text = policy.text_encoder.encode(['a sign that says "407"', 'a sign that says "12"'])
    g = torch.Generator().manual_seed(0)
    x, t = torch.randn(2, 3, 16, 48, generator=g), torch.tensor([0.9, 0.3])
    with torch.no_grad():
        expected = theirs(x, encoder_hidden_states=text.prompt_embeds, pooled_projections=text.tensors["pooled"], timestep=1000 * t).sample
        torch.testing.assert_close(policy.transformer(x, t, **text.tensors), expected, atol=1e-5, rtol=0)

    other = run.folder / "comparison.html"
    done = subprocess.run(
        command("report", str(run.folder), str(run.folder), "--out", str(other)), cwd=ROOT, text=True, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "gain [95 %]" in done.stdout
    assert other.stat().st_size > 0
    copied = run.folder.parent / "policy"
    subprocess.run(command("export", str(run.folder), str(copied)), cwd=ROOT, timeout=60, check=True)
    assert json.loads((copied / "provenance.json").read_text())["step"] == 4


@pytest.mark.long
def test_interrupt_then_resume(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "checkpoint_every=100")
    run.wait_for(lambda: run.updates() >= 2, "two updates")
    run.process.send_signal(signal.SIGINT)
    code, out, err = run.finish()
    assert code == 130, (out, err)
    assert "--resume" in err
    assert run.leftovers() == []
    done = run.updates()
    assert 2 <= done <= 4
    again = start("run", "--set", "checkpoint_every=100", "--resume")
    code, out, err = again.finish()
    assert code == 0, (out, err)
    check_finished(again.folder, 4)


@pytest.mark.long
def test_learner_rank_killed(start: Callable[..., Run]) -> None:
    """The worker group starts again from the last registered checkpoint and serves later steps again."""
    run = start("run", "--set", "updates=6")
    run.wait_for(lambda: run.updates() >= 3, "an update after the first checkpoint")
    run.kill("ray::RayTrainWorker")
    code, out, err = run.finish()
    assert code == 0, (out, err)
    assert run.leftovers() == []
    check_finished(run.folder, 6)


@pytest.mark.long
def test_supervised_training_from_random_weights(start: Callable[..., Run]) -> None:
    run = start("run", "--set", "data.batch_size=16", "--set", "optimizer.warmup=0", recipe="recipes/glyph-base.yaml")
    code, out, err = run.finish()
    assert code == 0, (out, err)
    losses = [r["data_loss"] for r in records(run.folder, "update")]
    assert len(losses) == 4
    assert "policy_loss" not in records(run.folder, "update")[0]


@pytest.mark.long
def test_joins_a_given_cluster_and_redis_and_leaves_them_running(start: Callable[..., Run], tmp_path: Path) -> None:
    with head_node() as head, EmbeddedRedis.start(tmp_path / "redis") as server:
        run = start("run", "--ray-address", head.address, "--set", f"redis.url={server.url}", environment=ENVIRONMENT)
        run.succeed()
        assert run.leftovers() == []
        config = load_config(run.folder / "config.yaml")
        buffer = ReplayBuffer(connect(server.url), config.name, buffer_settings(config))
        assert buffer.audit() == []
        assert buffer.counts()["settled"] == 16
        assert head.answers()
        assert [title for title in head.actors() if "Serve" in title or "Rollout" in title or "RayTrain" in title] == []


@pytest.mark.long
def test_two_runs_on_one_cluster_do_not_notice_each_other(start: Callable[..., Run], tmp_path: Path) -> None:
    """Other rewards each; the first is interrupted while the second trains, and takes only its own fleet down."""
    with head_node(cpus=32) as head, EmbeddedRedis.start(tmp_path / "redis") as server:
        common = ["--ray-address", head.address, "--set", f"redis.url={server.url}"]
        first = start("first", *common, "--set", "name=first", "--set", "updates=50", environment=ENVIRONMENT)
        second = start("second", *common, "--set", "name=second", "--set", "rewards={jpeg: {weight: 1.0}}", environment=ENVIRONMENT)
        first.wait_for(lambda: first.updates() >= 1, "the first run's first update")
        second.wait_for(lambda: second.updates() >= 1, "the second run's first update")
        first.process.send_signal(signal.SIGINT)
        code, out, err = first.finish()
        assert code == 130, (out, err)
        second.succeed()
        check_finished(second.folder, 4, url=server.url)
        assert json.loads((second.folder / "summary.json").read_text())["rewards"].keys() == {"jpeg"}
        assert first.leftovers() + second.leftovers() == []
        assert [title for title in head.actors() if "Serve" in title] == []
