"""Evaluations on a real Ray: made by generators, some of which are killed in the middle, and told why when they cannot be made."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from actors.config import DataConfig, EvaluationConfig, PromptConfig, RolloutConfig
from actors.evaluator import Evaluator, EvaluatorSpec
from actors.rewards import RunRewards
from actors.rollout import RolloutGenerator, RolloutSpec
from actors.weights.reading import Exported
from actors.weights.shards import local_slices, write_slices
from actors.weights.store import View, WeightStore
from actors.weights.table import complete
from actors.weights.transport import FolderTransport, ObjectTransport, Transport, WeightsGone
from diffusion.checkpoint import load_policy
from diffusion.config import ModelConfig, SamplerConfig
from services.config import FleetConfig
from tests.unit.actors.local import Nobody
from trainer.run.errors import root_cause

DEADLINE_S = 240.0
BASE = Path(__file__).resolve().parents[3] / "recipes" / "glyph-base"
MODEL = ModelConfig(path=str(BASE))
SAMPLER = SamplerConfig(eval_steps=8)
REWARDS = RunRewards(FleetConfig(url="http://127.0.0.1:9"), "rewards")
SETTINGS = EvaluationConfig(test_prompts=160, loss_points=80, diversity_prompts=3, diversity_samples=4)
pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture
def generators() -> Iterator[list[Any]]:
    spec = RolloutSpec(0, MODEL, SAMPLER, RolloutConfig(), PromptConfig(), DataConfig(), Nobody(), REWARDS)  # type: ignore[arg-type]
    actor = ray.remote(RolloutGenerator).options(num_cpus=0.1, max_concurrency=8, max_restarts=-1, max_task_retries=-1)
    made = [actor.remote(spec, None, i) for i in range(2)]
    ray.get([one.pid.remote() for one in made], timeout=DEADLINE_S)
    yield made
    for one in made:
        ray.kill(one)


def evaluator(generators: list[Any], run_dir: Path) -> Any:
    spec = EvaluatorSpec(tuple(generators), PromptConfig(), DataConfig(), SAMPLER, SETTINGS, REWARDS, str(run_dir))
    return ray.remote(Evaluator).options(num_cpus=0.1, max_restarts=3, max_task_retries=3).remote(spec)


def published(transport: Transport) -> View:
    state = load_policy(MODEL).transformer.state_dict()
    shard, objects = write_slices(transport, local_slices({name: tensor * 1.01 for name, tensor in state.items()}, 0), (1, 7), 0, 1)
    return View(complete([shard]), transport, objects)


@pytest.mark.parametrize("kind", ["folder", "objects"])
def test_an_evaluation_outlives_generators_and_its_numbers_do_not_change(kind: str, generators: list[Any], tmp_path: Path) -> None:
    weights = published(FolderTransport(str(tmp_path / "weights")) if kind == "folder" else ObjectTransport())
    made = evaluator(generators, tmp_path / "one")
    expected = ray.get(made.evaluate.remote(weights, "test", 7), timeout=DEADLINE_S)
    before = ray.get([one.pid.remote() for one in generators], timeout=DEADLINE_S)
    stop = threading.Event()
    killed: list[int] = []

    def kill() -> None:
        """The first at once, then the other, once the first is back."""
        for one in generators:
            if stop.wait(0.3):
                return
            pid = ray.get(one.pid.remote(), timeout=DEADLINE_S)
            with contextlib.suppress(psutil.NoSuchProcess):
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
            ray.get(one.pid.remote(), timeout=DEADLINE_S)

    thread = threading.Thread(target=kill)
    again = evaluator(generators, tmp_path / "two")
    reference = again.evaluate.remote(weights, "test", 7)
    thread.start()
    found = ray.get(reference, timeout=DEADLINE_S)
    stop.set()
    thread.join(DEADLINE_S)
    assert killed
    assert set(killed) <= set(before)
    assert found == expected
    one, two = (json.loads((tmp_path / name / "eval" / "test-000007-raw.json").read_text()) for name in ("one", "two"))
    assert one == two
    for actor in (made, again):
        ray.kill(actor)


def test_weights_that_are_gone_are_told_as_such(generators: list[Any], tmp_path: Path) -> None:
    """Over two hops, so that the driver calls the evaluation missing and not failed."""
    weights = published(FolderTransport(str(tmp_path / "weights")))
    for file in (tmp_path / "weights").rglob("*.safetensors"):
        file.unlink()
    made = evaluator(generators, tmp_path)
    with pytest.raises(Exception, match="weights of version 7 are gone") as caught:
        ray.get(made.evaluate.remote(weights, "test", 7), timeout=DEADLINE_S)
    assert isinstance(root_cause(caught.value), WeightsGone)
    store: Any = ray.remote(WeightStore).options(num_cpus=0.1).remote(FolderTransport(str(tmp_path / "none")))
    with pytest.raises(Exception, match="version 9 is not kept any more") as caught:
        ray.get(made.evaluate.remote(store.view.remote(None, 9), "test", 9), timeout=DEADLINE_S)
    assert isinstance(root_cause(caught.value), WeightsGone)
    # nothing of it stays: the next one is made
    record = ray.get(made.evaluate.remote(Exported(3, str(BASE / "transformer")), "test", 3), timeout=DEADLINE_S)
    assert record["diffusion_loss"] > 0
    for actor in (made, store):
        ray.kill(actor)
