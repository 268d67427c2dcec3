"""Weights from files into a model: shards and their index, types on the way, nothing twice in memory, all or nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn

from diffusion.checkpoint import load_codec, load_network
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.families.sd3.network import SD3Transformer
from diffusion.families.sd3.tiny import write_tiny
from diffusion.source import CheckpointError
from diffusion.weights import WEIGHTS, load_weights, shapes_of

ROOT = Path(__file__).resolve().parents[3]
INDEX = f"{WEIGHTS}.index.json"


def sharded(folder: Path, parts: list[dict[str, torch.Tensor]]) -> None:
    weight_map = {}
    for i, part in enumerate(parts, 1):
        name = f"diffusion_pytorch_model-{i:05d}-of-{len(parts):05d}.safetensors"
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def shards(tmp_path: Path) -> dict[str, torch.Tensor]:
    """A linear layer with a buffer, in two shards in half precision, and beside them another variant of it."""
    state = {"weight": torch.randn(3, 2).half(), "bias": torch.randn(3).half(), "steps": torch.tensor(7)}
    sharded(tmp_path, [{"weight": state["weight"]}, {k: state[k] for k in ("bias", "steps")}])
    save_file({"weight": torch.zeros(9, 9)}, tmp_path / "diffusion_pytorch_model.fp16.safetensors")
    return state


def layer(device: str = "meta") -> nn.Linear:
    with torch.device(device):
        made = nn.Linear(2, 3)
        made.register_buffer("steps", torch.tensor(0))
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_tensors_are_cast_while_they_are_read(device: str, dtype: torch.dtype, tmp_path: Path, shards: dict[str, torch.Tensor]) -> None:
    model = layer(device)
    model.bias.requires_grad_(False)
    load_weights(model, tmp_path, dtype)
    for name, tensor in model.state_dict().items():
        assert tensor.device.type == "cpu"
        assert torch.equal(tensor, shards[name].to(dtype) if name != "steps" else shards[name])
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
    assert model.steps.dtype == torch.int64


def test_what_was_read_does_not_depend_on_the_file_any_more(tmp_path: Path) -> None:
    model = layer()
    state = {"weight": torch.ones(3, 2), "bias": torch.ones(3), "steps": torch.tensor(7)}
    save_file(state, tmp_path / WEIGHTS)
    load_weights(model, tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"\0" * (tmp_path / WEIGHTS).stat().st_size)  # in place, as a copy over it does
    assert torch.equal(model.weight, state["weight"])


def edit_index(change: Callable[[dict[str, str]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def add_tensor(folder: Path) -> None:
    path = folder / "diffusion_pytorch_model-00001-of-00002.safetensors"
    save_file({**load_file(path), "extra": torch.zeros(1)}, path)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a tensor that the index does not list": (add_tensor, r"disagree on 1 tensors \['extra'\]"),
    "a tensor that no shard holds": (edit_index(lambda m: m.update(other=m["weight"])), r"disagree on 1 tensors \['other'\]"),
    "a tensor in another shard": (edit_index(lambda m: m.update(bias=m["weight"])), r"disagree on 1 tensors \['bias'\]"),
    "a shard that is not there": (lambda f: (f / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink(), "00002-of-00002.safetensors cannot be read"),
    "a shard cut short": (
        lambda f: (f / "diffusion_pytorch_model-00001-of-00002.safetensors").write_bytes(
            (f / "diffusion_pytorch_model-00001-of-00002.safetensors").read_bytes()[:-4]
        ),
        "00001-of-00002.safetensors cannot be read",
    ),
    "no index": (lambda f: (f / INDEX).unlink(), f"holds no {WEIGHTS}; do this"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_and_the_model_stays_as_it_was(name: str, tmp_path: Path, shards: dict[str, torch.Tensor]) -> None:
    assert [len(names) for names in shapes_of(tmp_path).values()] == [1, 2]
    damage, message = DAMAGE[name]
    damage(tmp_path)
    model = layer("cpu")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message):
        load_weights(model, tmp_path, remedy="do this")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


PEAK = """
import sys, threading, torch
from torch import nn
from diffusion.weights import load_weights

def own():  # memory of this process alone, without the pages of mapped files
    return 1024 * int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1])

with torch.device("meta"):
    model = nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(16)))
start = peak = own()
done = threading.Event()
def watch():
    global peak
    while not done.wait(0.001):
        peak = max(peak, own())
thread = threading.Thread(target=watch)
thread.start()
load_weights(model, __import__("pathlib").Path(sys.argv[1]))
done.set()
thread.join()
assert all(float(p[0, 0]) == i for i, p in enumerate(model.parameters()))
print(peak - start, sum(p.nbytes for p in model.parameters()))
"""


def test_loading_needs_the_model_and_one_shard_beside_it(tmp_path: Path) -> None:
    """256 MiB of fp32 from four bf16 shards of 32 MiB. Read whole before they are cast, the files would add 128."""
    parts: list[dict[str, torch.Tensor]] = [{} for _ in range(4)]
    for i in range(16):
        parts[i // 4][f"{i}.weight"] = torch.full((2048, 2048), i, dtype=torch.bfloat16)
    sharded(tmp_path, parts)
    done = subprocess.run([sys.executable, "-c", PEAK, str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    peak, target = map(int, done.stdout.split())
    assert target == 2**28
    assert 0.9 * target < peak < target + 2**25 + 2**23  # the kernel counts in strides


def test_a_base_in_bfloat16_carries_an_adapter_in_fp32(tmp_path: Path) -> None:
    write_tiny(tmp_path / "pipeline")
    stored = load_file(tmp_path / "pipeline" / "transformer" / WEIGHTS)
    config = ModelConfig(path=str(tmp_path / "pipeline"), dtype="bfloat16", base_dtype="bfloat16", lora=LoRAConfig(rank=4))
    model, _ = load_network(config)
    assert isinstance(model, SD3Transformer)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == (torch.float32 if ".lora_" in name else torch.bfloat16)
        assert ".lora_" in name or torch.equal(tensor, stored[name].bfloat16())
    inputs = torch.randn(2, 16, 8, 4), torch.rand(2), torch.randn(2, 9, 96), torch.randn(2, 48)
    exact, _ = load_network(ModelConfig(path=str(tmp_path / "pipeline")))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model(*inputs)
        torch.testing.assert_close(found.float(), exact(*inputs).float(), atol=0.05, rtol=0.05)
    assert {p.dtype for p in load_codec(tmp_path / "pipeline").vae.parameters()} == {torch.float32}  # type: ignore[attr-defined]


@pytest.mark.parametrize("keys", [{}, {"dtype": "bfloat16"}, {"lora": LoRAConfig(rank=4)}])
def test_trained_weights_are_held_in_fp32(keys: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match="base_dtype=bfloat16 is for frozen weights beside an adapter"):
        ModelConfig(base_dtype="bfloat16", **keys)  # type: ignore[arg-type]
