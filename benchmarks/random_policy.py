"""Folders of published architectures with random weights: what a run at full size is tried on without the published files.

Classes, layout and file names are the published ones'; sizes are those of `trainer.plan.published`. The tokenizers are those of the family's
tiny folders: their ids are fewer than the embeddings' rows. Of Cosmos-Reason1 the vision tower, which nothing reads, is the tiny one's too.
Weights are drawn with a standard deviation of 0.02, as most of these models are initialised; gains are one, biases zero. What is held at a
time is one shard.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.families.cosmos.tiny import write_tiny as tiny_cosmos
from diffusion.families.sd3.tiny import write_tiny as tiny_sd3
from diffusion.families.wan.tiny import write_tiny as tiny_wan
from diffusion.weights import write_weights
from trainer.plan.published import PUBLISHED

BLOCK = 1 << 24
STANDARD_DEVIATION = 0.02
FORMAT = 2
"""Of the folders that this file writes; one of another is written anew."""


@dataclass(frozen=True)
class Architecture:
    """A policy whose sizes are published.

    Attributes:
        name: its hub id, of `trainer.plan.published`.
        write_tiny: writes the tiny folder that lends it everything but sizes and weights.
        more: keys of config.json beside the published ones, by part: what a plan does not need.
        within: parts whose sizes stand within a key of config.json.
    """

    name: str
    write_tiny: Callable[[Path], None]
    more: dict[str, dict[str, Any]]
    within: dict[str, str]


CLIP_HEADS = {"text_encoder": {"num_attention_heads": 12}, "text_encoder_2": {"num_attention_heads": 20}}
"""Of CLIP ViT-L/14 and ViT-bigG/14 (their published configurations)."""
REASON1 = {"text_encoder": {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}}}
"""Rotary sections of Qwen2.5-VL-7B (its published configuration)."""
ARCHITECTURES = {
    "sd35-medium": Architecture("stabilityai/stable-diffusion-3.5-medium", lambda folder: tiny_sd3(folder, "sd35"), CLIP_HEADS, {}),
    "wan21-1.3b": Architecture("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", tiny_wan, {}, {}),
    "cosmos25-2b": Architecture("nvidia/Cosmos-Predict2.5-2B", tiny_cosmos, REASON1, {"text_encoder": "text_config"}),
}


def write_policy(folder: Path, architecture: Architecture, dtype: torch.dtype = torch.bfloat16) -> None:
    """Write the folder where it is not there whole already: 16 GB of SD3.5-medium, 14 of Wan 1.3B, 20 of Cosmos 2B.

    `dtype` is the policy network's; encoders and codecs are in bfloat16.
    """
    done = folder / "written.json"
    about = {"name": architecture.name, "format": FORMAT, "dtype": str(dtype)}
    if done.exists() and json.loads(done.read_text()) == about:
        return
    architecture.write_tiny(folder)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(0)).mul_(STANDARD_DEVIATION).bfloat16()
    for part, published in PUBLISHED[architecture.name].items():
        file = folder / part / "config.json"
        values = _sized(json.loads(file.read_text()), published | architecture.more.get(part, {}), architecture.within.get(part))
        file.write_text(json.dumps(values, indent=2) + "\n")
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        _write(folder / part, part, values, block.to(dtype if part == "transformer" else torch.bfloat16))
    done.write_text(json.dumps(about) + "\n")


def _sized(values: dict[str, Any], sizes: dict[str, Any], within: str | None) -> dict[str, Any]:
    """A tiny folder's configuration with other sizes."""
    if within is None:
        return values | sizes
    tiny = values[within]
    sized = tiny | sizes | {"layer_types": tiny["layer_types"][:1] * sizes["num_hidden_layers"]}
    tower = values["vision_config"] | {"out_hidden_size": sizes["hidden_size"]}
    return values | {within: sized, "vision_config": tower}


def _write(folder: Path, part: str, values: dict[str, Any], block: Tensor) -> None:
    write_weights(folder, _drawn(_module(part, values), block))
    if part.startswith("text_encoder"):  # transformers' names
        for file in folder.glob("diffusion_pytorch_model*"):
            new = file.name.replace("diffusion_pytorch_model", "model")
            if file.suffix == ".json":
                file.write_text(file.read_text().replace("diffusion_pytorch_model", "model"))
            file.rename(folder / new)


def _module(part: str, values: dict[str, Any]) -> nn.Module:
    """A component on the meta device."""
    import diffusers as found
    import transformers as text

    diffusers, transformers = found, text  # type: Any, Any
    with torch.device("meta"):
        if not part.startswith("text_encoder"):
            module: nn.Module = getattr(diffusers, values["_class_name"]).from_config(values)
            return module
        make = getattr(transformers, values["architectures"][0])
        encoder: nn.Module = make(make.config_class.from_dict(values))
        return encoder


def _drawn(module: nn.Module, block: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a file of `module` holds, tied ones once, cut from `block` again and again."""
    seen: set[int] = set()
    for number, (name, tensor) in enumerate(module.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.dim() < 2 or name.endswith("gamma"):
            yield name, torch.full(tensor.shape, float(name.endswith(("weight", "gamma"))), dtype=block.dtype)
            continue
        start = 7919 * number % BLOCK
        count = -(-(tensor.numel() + start) // BLOCK)
        yield name, block.repeat(count)[start : start + tensor.numel()].reshape(tensor.shape)
