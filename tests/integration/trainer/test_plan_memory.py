"""The planner's bytes against a learner that is built and updated: random weights, processes of their own, resident memory.

Compared, within 15 %: what is held before the first update (weights, average), what an update adds to what is held between updates
(gradients, activations, casts and gathered copies of weights), and a checkpoint's bytes on disk (within 2 %). Of the larger policy also the
whole peak; of the tiny one it is mostly Python.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffusion.families.glyph import policy
from trainer.config.load import parse_config
from trainer.plan.assumptions import Assumptions
from trainer.plan.memory import learner_rank
from trainer.plan.sizes import sizes_of
from trainer.plan.storage import storage_of

ROOT = Path(__file__).resolve().parents[3]
LARGER = {"num_layers": 6, "attention_head_dim": 64, "num_attention_heads": 10, "caption_projection_dim": 640}
"""85 M parameters."""
RUNTIME = 45e6
"""What a learner takes of Python, the text encoder and torch's own caches, beside tensors; and as much again in its first update."""


def tree(folder: Path, side: tuple[int, int], micro: int, ranks: int, rank: int, dtype: str) -> dict[str, Any]:
    lora = {"lora": {"rank": rank, "alpha": 16}} if rank else {}
    return {
        "model": {"path": str(folder / "policy"), "init": True, "dtype": dtype, **lora},
        "sampler": {"height": side[0], "width": side[1]},
        "learner": {"ranks": ranks, "micro_batch": micro},
        "rollout": {"groups_per_step": ranks, "group_size": micro},
        "objective": {"data_weight": 0.1},
    }


def measured(folder: Path, recipe: dict[str, Any]) -> dict[str, int]:
    """What rank 0 prints."""
    (folder / "recipe.json").write_text(json.dumps(recipe))
    ranks = recipe["learner"]["ranks"]
    # every tensor is mapped by itself and given back when it is freed: resident memory is what is alive
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.integration.trainer.learner_memory", str(folder / "recipe.json")]
    processes = [
        subprocess.Popen([*command, str(r), str(folder)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for r in range(ranks)
    ]
    printed = []
    try:
        for process in processes:
            out, err = process.communicate(timeout=900)
            assert process.returncode == 0, err[-3000:]
            printed.append(json.loads(out.splitlines()[-1]))
    finally:
        for process in processes:
            process.kill()
    return dict(printed[0])


def compare(folder: Path, recipe: dict[str, Any], changes: dict[str, Any], whole: bool) -> None:
    policy.write_skeleton(folder / "policy")
    file = folder / "policy" / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    found = measured(folder, recipe)
    config = parse_config(recipe)
    sizes = sizes_of(config, Assumptions())
    parts = {part.name: part.bytes for part in learner_rank(config, sizes)}
    built = parts["weights"] + parts["average"]
    between = built + parts["optimiser"]
    added = sum(parts.values()) - between - parts["rows of a pass"]  # which a CPU reads where they are
    print(recipe["model"], {"planned": {"built": built, "added": added, "peak": between + added}, "measured": found})
    if whole:
        assert found["built"] == pytest.approx(built + RUNTIME, rel=0.15)
        assert found["held"] == pytest.approx(between + 2 * RUNTIME, rel=0.15)
        assert found["update"] == pytest.approx(between + added + 2 * RUNTIME, rel=0.15)
    assert found["update"] - found["held"] == pytest.approx(added, rel=0.15)
    kept = {part.name: part.bytes for part in storage_of(config, sizes).disk}
    assert found["checkpoint"] == pytest.approx(kept["checkpoints"] / 3, rel=0.02, abs=2e6)  # beside the tensors, their names and shapes


@pytest.mark.parametrize("rank", [0, 16], ids=["full", "adapter"])
def test_the_glyph_policy(tmp_path: Path, rank: int) -> None:
    compare(tmp_path, tree(tmp_path, (16, 48), 96, 1, rank, "float32"), {}, whole=False)


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rank", [0, 16], ids=["full", "adapter"])
def test_a_policy_of_85_million_parameters(tmp_path: Path, rank: int, dtype: str) -> None:
    compare(tmp_path, tree(tmp_path, (64, 64), 4, 1, rank, dtype), LARGER, whole=True)


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 16], ids=["full", "adapter"])
def test_two_ranks(tmp_path: Path, rank: int) -> None:
    compare(tmp_path, tree(tmp_path, (32, 32), 2, 2, rank, "float32"), LARGER, whole=True)
