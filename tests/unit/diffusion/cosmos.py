"""diffusers' Cosmos for tests: the network with random weights, the pipeline without guardrail, and what both call of torchvision, which is not
installed: resizing a mask of zeros, and a picture to a tensor."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_cosmos
from diffusers.pipelines.cosmos import pipeline_cosmos2_5_predict as pipelines
from PIL import Image
from torch import Tensor

TINY: dict[str, Any] = {
    "in_channels": 5,
    "out_channels": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 18,
    "num_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 10,
    "adaln_lora_dim": 6,
    "max_size": (8, 24, 24),
    "patch_size": (1, 2, 2),
    "rope_scale": (1.0, 3.0, 3.0),
    "concat_padding_mask": True,
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 14,
    "encoder_hidden_states_channels": 10,
}


def _resize(mask: Tensor, size: list[int], interpolation: str) -> Tensor:
    return F.interpolate(mask, size, mode=interpolation)


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() / 255


def torchvision() -> None:
    """Give diffusers' modules the functions that they call."""
    transforms = SimpleNamespace(functional=SimpleNamespace(resize=_resize, to_tensor=_to_tensor), InterpolationMode=SimpleNamespace(NEAREST="nearest"))
    if not hasattr(transformer_cosmos, "transforms"):
        transformer_cosmos.transforms = transforms  # type: ignore[attr-defined]
    if not hasattr(pipelines, "torchvision"):
        pipelines.torchvision = SimpleNamespace(transforms=transforms)  # type: ignore[attr-defined]


class NoGuardrail:
    """Lets everything pass: the guardrail's models are not downloaded."""

    def to(self, device: Any) -> None:
        pass

    def check_text_safety(self, prompt: str) -> bool:
        return True


def pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The whole pipeline of a folder."""
    torchvision()
    opened = pipelines.Cosmos2_5_PredictBasePipeline.from_pretrained(folder, safety_checker=NoGuardrail(), torch_dtype=dtype)
    opened.set_progress_bar_config(disable=True)
    return opened


def diffusers_model(seed: int = 0, **keys: Any) -> Any:
    """diffusers' network with its own random weights; norm gains moved away from one."""
    torchvision()
    torch.manual_seed(seed)
    model = transformer_cosmos.CosmosTransformer3DModel(**{**TINY, **keys}).eval()
    for name, parameter in model.named_parameters():
        if name.startswith("learnable_pos_embed"):  # zeros, which have no direction
            parameter.data += torch.randn_like(parameter)
        if "norm" in name and parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def theirs(model: Any, whole: Tensor, t: Tensor, embeds: Tensor, frames: int = 0, given_time: float | None = None, fps: int | None = None) -> Tensor:
    """Velocity of one clip `[C, f, h, w]` as the pipeline asks for it: a mask of given frames and a time for each frame."""
    mask = whole.new_zeros(1, 1, *whole.shape[1:])
    mask[:, :, :frames] = 1
    times = t.expand(1, 1, whole.shape[1], 1, 1).clone()
    if given_time is not None:
        times[:, :, :frames] = given_time
    padding = whole.new_zeros(1, 1, *whole.shape[2:])
    found: Tensor = model(whole[None], times, embeds[None], condition_mask=mask, padding_mask=padding, fps=fps).sample[0]
    return found
