"""A folder of SD3.5-medium's real architecture with random weights in bf16: what a run at full size is tried on without the published files.

Classes, layout and file names are the published ones'; sizes are those of `trainer.plan.published`. The tokenizers are the tiny ones of
`diffusion.families.sd3.tiny`: their ids are fewer than the embeddings' rows. Weights are drawn with a standard deviation of 0.02, as all of
these models are initialised; norms are one, biases zero. What is held at a time is one shard.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.families.sd3.tiny import write_tiny
from diffusion.weights import write_weights
from trainer.plan.published import PUBLISHED

NAME = "stabilityai/stable-diffusion-3.5-medium"
HEADS = {"text_encoder": 12, "text_encoder_2": 20}
"""Attention heads of CLIP ViT-L/14 and ViT-bigG/14 (their published configurations); a plan does not need them."""
BLOCK = 1 << 24
STANDARD_DEVIATION = 0.02


def write_policy(folder: Path, seed: int = 0) -> None:
    """Write the folder, 15.6 GB, where it is not there whole already."""
    done = folder / "written.json"
    about = {"name": NAME, "seed": seed, "format": 1}
    if done.exists() and json.loads(done.read_text()) == about:
        return
    write_tiny(folder, "sd35", seed=seed)
    block = torch.randn(BLOCK, generator=torch.Generator().manual_seed(seed)).mul_(STANDARD_DEVIATION).bfloat16()
    for part, published in PUBLISHED[NAME].items():
        file = folder / part / "config.json"
        values = json.loads(file.read_text()) | published
        if part in HEADS:
            values["num_attention_heads"] = HEADS[part]
        file.write_text(json.dumps(values, indent=2) + "\n")
        for old in (folder / part).glob("*.safetensors*"):
            old.unlink()
        _write(folder / part, part, values, block)
    done.write_text(json.dumps(about) + "\n")


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
        name = values["architectures"][0]
        config = transformers.T5Config if name == "T5EncoderModel" else transformers.CLIPTextConfig
        encoder: nn.Module = getattr(transformers, name)(config(**values))
        return encoder


def _drawn(module: nn.Module, block: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that a file of `module` holds, tied ones once, cut from `block` again and again."""
    seen: set[int] = set()
    for number, (name, tensor) in enumerate(module.state_dict(keep_vars=True).items()):
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        if tensor.dim() < 2:
            yield name, torch.full(tensor.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
            continue
        start = 7919 * number % BLOCK
        count = -(-(tensor.numel() + start) // BLOCK)
        yield name, block.repeat(count)[start : start + tensor.numel()].reshape(tensor.shape)
