"""Whole runs that train an adapter, at reduced size: it alone travels, and what is exported opens with it and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from actors.weights.store import WeightStore
from actors.weights.transport import FolderTransport
from diffusion import weights
from diffusion.lora import PREFIX, WEIGHTS
from tests.e2e.test_kernels import FEW, trained
from tests.pipeline import ROOT, Run, settings

ADAPTER = settings("model.lora.rank=4", "model.lora.alpha=8", "objective.kl_weight=0.01", "replay.max_staleness=0", "optimizer.lr=1e-3")


@pytest.mark.long
@pytest.mark.parametrize("merge", [False, True])
def test_an_adapter_is_trained_published_and_exported(merge: bool, start: Callable[..., Run]) -> None:
    merged = settings("model.lora.merge=true", "objective.old_log_prob=learner") if merge else []
    run = start("run", *FEW, *ADAPTER, *merged)
    _, updates = trained(run)
    assert all(update["ratio_deviation"] < 1e-5 for update in updates)
    assert updates[-1]["reverse_kl"] > 0
    newest_version = max((run.folder / "weights").iterdir(), key=lambda f: [int(n) for n in f.name.split("-")])
    view = WeightStore(FolderTransport(str(run.folder / "weights"))).view()
    assert view is not None
    assert "-".join(map(str, view.table.name)) == newest_version.name
    adapter = {name: torch.empty(shape) for name, shape in view.table.shapes.items()}
    for name, place, piece in view.open(60.0).pieces():
        adapter[name][place].copy_(piece)
    assert adapter
    assert all(".lora_" in name for name in adapter)
    out = newest(run.folder / "exports")
    stored = {name.removeprefix(PREFIX): tensor for name, tensor in load_file(out / WEIGHTS).items()}
    assert stored.keys() == adapter.keys()
    assert all(torch.equal(stored[name], adapter[name]) for name in adapter)
    before, after = (load_file(f / "transformer" / weights.WEIGHTS) for f in (ROOT / "recipes" / "glyph-base", out))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    adapted = {name.replace("lora_A.", "") for name in adapter if "lora_A" in name}
    assert changed == adapted - {"transformer_blocks.3.attn.add_q_proj.weight"}  # the last block asks nothing for the text


def newest(exports: Path) -> Path:
    return max(f for f in exports.glob("step-*") if not f.name.endswith("-ema"))
