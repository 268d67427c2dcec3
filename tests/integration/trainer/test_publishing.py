"""A version that an evaluation will ask for is there when the update's line says so: the driver asks as soon as it reads that line."""

from __future__ import annotations

import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
import torch.distributed as dist

from actors.weights.store import WeightStore
from actors.weights.transport import FolderTransport
from diffusion.lora import trained_weights
from trainer.config.load import parse_config
from trainer.learn.checkpoint import Progress
from trainer.learn.entry import LoopSpec
from trainer.learn.loop import publish

DEADLINE_S = 120.0
NAME = (3, 0)


class Rank:
    """A rank of a gloo group that hands in its shard, `late_s` after it was asked."""

    def __init__(self, rank: int, folder: str) -> None:
        self.rank, self.folder = rank, folder
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/meet", 2), rank=rank, world_size=2, timeout=timedelta(seconds=DEADLINE_S))

    def publish(self, store: Any, late_s: float, wanted: bool) -> bool:
        """Whether the version stood when this rank had published."""
        time.sleep(late_s)
        spec = LoopSpec(parse_config({}), None, self.folder, store, FolderTransport(f"{self.folder}/weights"))  # type: ignore[arg-type]
        layer = torch.nn.Linear(4, 4)
        learner: Any = SimpleNamespace(sampling_weights=lambda: trained_weights(layer), device=torch.device("cpu"))
        publish(spec, None, learner, Progress(step=NAME[1], epoch=NAME[0]), self.rank, 2, wanted)  # type: ignore[arg-type]
        return bool(ray.get(store.stands.remote(NAME), timeout=DEADLINE_S))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("slow", [0, 1])
def test_no_rank_goes_on_before_a_wanted_version_stands(slow: int, tmp_path: Path) -> None:
    store: Any = ray.remote(WeightStore).options(num_cpus=0.1).remote(FolderTransport(str(tmp_path / "weights")))
    ranks: list[Any] = [ray.remote(Rank).options(num_cpus=0.1).remote(rank, str(tmp_path)) for rank in range(2)]
    stood = ray.get([rank.publish.remote(store, 2.0 * (i == slow), True) for i, rank in enumerate(ranks)], timeout=DEADLINE_S)
    assert stood == [True, True]
    view = ray.get(store.view.remote(None, NAME[1]), timeout=DEADLINE_S)
    assert view.version == NAME[1]
    for actor in (*ranks, store):
        ray.kill(actor)
