"""A generator of two processes on a real Ray: it samples what one process samples, and comes back when either is killed."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from actors.config import DataConfig, PromptConfig, RolloutConfig
from actors.ranks import GeneratorRank
from actors.rollout import RolloutGenerator, RolloutSpec
from actors.sources.draws import held_out_examples, make_source
from actors.weights.shards import local_slices, write_slices
from actors.weights.store import View
from actors.weights.table import complete
from actors.weights.transport import FolderTransport
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from tests.unit.actors.local import NO_REWARDS, Nobody

DEADLINE_S = 240.0
BASE = Path(__file__).resolve().parents[3] / "recipes" / "glyph-video-base"
MODEL = ModelConfig(path=str(BASE))
SAMPLER = SamplerConfig(height=12, width=32, frames=5, fps=8, eval_steps=6)
pytestmark = pytest.mark.usefixtures("ray_cluster")


def started(ranks: int) -> Any:
    rollout, data = RolloutConfig(sequence_ranks=ranks), DataConfig(kind="glyph_video")
    spec = RolloutSpec(0, MODEL, SAMPLER, rollout, PromptConfig(), data, Nobody(), NO_REWARDS)  # type: ignore[arg-type]
    return ray.remote(RolloutGenerator).options(num_cpus=0.1, max_concurrency=8, max_restarts=-1, max_task_retries=-1).remote(spec, None, 0)


@pytest.fixture(scope="module")
def alone(ray_cluster: None) -> Iterator[Any]:
    made = started(1)
    yield made
    ray.kill(made)


@pytest.fixture
def shared(ray_cluster: None) -> Iterator[Any]:
    made = started(2)
    yield made
    ray.kill(made)


def asked(actor: Any, method: str, *arguments: Any) -> Any:
    return ray.get(getattr(actor, method).remote(*arguments), timeout=DEADLINE_S)


def followers() -> list[psutil.Process]:
    """Processes of ranks that follow."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if (process.info["cmdline"] or [""])[0].startswith(f"ray::{GeneratorRank.__name__}"):
            found.append(process)
    return found


def published(folder: Path) -> View:
    state = load_policy(MODEL).transformer.state_dict()
    transport = FolderTransport(str(folder))
    shard, objects = write_slices(transport, local_slices({name: tensor * 1.03 for name, tensor in state.items()}, 0), (1, 7), 0, 1)
    return View(complete([shard]), transport, objects)


def test_two_processes_sample_and_judge_as_one_and_come_back_together(alone: Any, shared: Any, tmp_path: Path) -> None:
    examples = held_out_examples(make_source("glyph_video", None), "test", 4)
    start, view = None, published(tmp_path)

    def agree() -> None:
        for weights in (start, view):
            one, two = (asked(actor, "sample_held_out", weights, "here", examples, 0, 2) for actor in (alone, shared))
            assert one.shape == (8, 5, 12, 32, 3)
            assert np.abs(one.astype(int) - two.astype(int)).max() <= 1
            losses = [[loss for _, loss in asked(actor, "held_out_losses", weights, "test", 16, 0, 16)] for actor in (alone, shared)]
            assert losses[1] == pytest.approx(losses[0], rel=1e-4)
            seen.append(losses[0])

    seen: list[list[float]] = []
    agree()
    assert seen[0] != pytest.approx(seen[1], rel=1e-2)  # other weights came to all ranks
    (first,) = followers()
    leader = asked(shared, "pid")
    os.kill(first.pid, signal.SIGKILL)
    agree()  # the leader ended with its rank; Ray started it again, and asked once more
    (second,) = followers()
    assert second.pid != first.pid
    assert asked(shared, "pid") != leader
    os.kill(asked(shared, "pid"), signal.SIGKILL)
    psutil.wait_procs([second], timeout=60)
    agree()
    (third,) = followers()
    assert third.pid != second.pid
