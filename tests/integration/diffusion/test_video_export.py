"""A trained video policy opens in diffusers as what it is: a whole pipeline, or an adapter on the pipeline that training started from."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from torch import Tensor

from diffusion.checkpoint import load_network, save_policy
from diffusion.config import LoRAConfig, ModelConfig
from diffusion.families.base import PackedModel
from diffusion.families.cosmos import tiny as cosmos
from diffusion.families.wan import tiny as wan
from diffusion.lora import WEIGHTS, adapter_bytes, merged_state
from tests.unit.diffusion.cosmos import pipeline as open_cosmos

Write = Callable[[Path], None]
Open = Callable[[Path], Any]
KINDS: dict[str, tuple[Write, Open]] = {
    "wan": (wan.write_tiny, WanPipeline.from_pretrained),
    "wan i2v": (partial(wan.write_tiny, style="i2v"), WanImageToVideoPipeline.from_pretrained),
    "wan ti2v": (partial(wan.write_tiny, style="ti2v"), WanPipeline.from_pretrained),
    "cosmos": (cosmos.write_tiny, open_cosmos),
}
T = torch.tensor([0.4])


def inputs(model: PackedModel, image: bool) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(2)
    channels = int(getattr(model.config, "prompt_channels", 0) or getattr(model.config, "text_dim", 0))
    found = {"latents": torch.randn(1, model.latent_channels, 3, 4, 6, generator=g), "prompt_embeds": torch.randn(1, 512, channels, generator=g)}
    if image:
        found |= {"condition": torch.randn(1, 20, 3, 4, 6, generator=g), "image_embeds": torch.randn(1, 257, 24, generator=g)}
    return found


@torch.no_grad()
def theirs(network: Any, x: dict[str, Tensor]) -> Tensor:
    latents, text = x["latents"], x["prompt_embeds"]
    if type(network).__name__ == "CosmosTransformer3DModel":
        mask, padding = torch.zeros(1, 1, *latents.shape[2:]), torch.zeros(1, 1, *latents.shape[3:])
        found: Tensor = network(latents, T, text, condition_mask=mask, padding_mask=padding).sample
    elif "condition" in x:
        found = network(torch.cat([latents, x["condition"]], 1), 1000 * T, text, x["image_embeds"]).sample
    else:
        found = network(latents, 1000 * T, text).sample
    return found


@torch.no_grad()
def ours(model: PackedModel, x: dict[str, Tensor]) -> Tensor:
    rest = {name: tensor for name, tensor in x.items() if name != "latents"}
    found = model(x["latents"], T, **rest)
    assert isinstance(found, Tensor)
    return found


def trained(folder: Path, lora: LoRAConfig | None = None) -> PackedModel:
    """The network after something was learnt, by the adapter or by all weights."""
    model = load_network(ModelConfig(path=str(folder), lora=lora or LoRAConfig()))[0].eval()
    g = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=g)
    return model


def names(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_trained_policy_opens_as_a_whole_pipeline(kind: str, tmp_path: Path) -> None:
    write, opened = KINDS[kind]
    base, out = tmp_path / "base", tmp_path / "out"
    write(base)
    model = trained(base)
    save_policy(out, base, model.state_dict())
    assert names(out) == names(base)
    x = inputs(model, kind == "wan i2v")
    torch.testing.assert_close(theirs(opened(out).transformer, x), ours(model, x), atol=1e-5, rtol=1e-5)
    assert (theirs(opened(base).transformer, x) - ours(model, x)).abs().max() > 1e-2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("targets", ["attention", ("attn1.to_q", "net.0.proj")])
def test_an_adapter_opens_on_the_pipeline_it_was_trained_on(kind: str, targets: Any, tmp_path: Path) -> None:
    write, opened = KINDS[kind]
    base, out = tmp_path / "base", tmp_path / "out"
    write(base)
    lora = LoRAConfig(rank=4, alpha=10.0, targets=targets)
    model = trained(base, lora)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_policy(out, base, merged_state(state, lora), {WEIGHTS: adapter_bytes(state, lora)})
    x = inputs(model, kind == "wan i2v")
    pipeline = opened(base)
    before = theirs(pipeline.transformer, x)
    pipeline.load_lora_weights(out, weight_name=WEIGHTS)
    adapted = theirs(pipeline.transformer, x)
    assert (adapted - before).abs().max() > 1e-3
    torch.testing.assert_close(adapted, ours(model, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs(opened(out).transformer, x), ours(model, x), atol=1e-4, rtol=1e-4)


def test_tensors_that_no_network_reads_are_passed_over(tmp_path: Path) -> None:
    """Published Wan files may hold `norm_added_q`, which diffusers ignores by declaration."""
    from safetensors.torch import load_file, save_file

    wan.write_tiny(tmp_path, "i2v")
    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file, metadata={"format": "pt"})
    assert load_network(ModelConfig(path=str(tmp_path)))[0].latent_channels == 16
