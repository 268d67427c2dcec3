"""What is measured: networks of public sizes with random weights, ours and diffusers' on the same tensors, and their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.families.base import PackedModel
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer

SD35_MEDIUM = SD3Config(
    sample_size=128,
    num_layers=24,
    attention_head_dim=64,
    num_attention_heads=24,
    caption_projection_dim=1536,
    pos_embed_max_size=384,
    dual_attention_layers=tuple(range(13)),
    qk_norm="rms_norm",
)
WAN_1_3B = WanConfig(num_attention_heads=12, ffn_dim=8960, num_layers=30)
TINY_SD3 = SD3Config(
    sample_size=16,
    num_layers=2,
    attention_head_dim=16,
    num_attention_heads=2,
    joint_attention_dim=24,
    caption_projection_dim=32,
    pooled_projection_dim=12,
    pos_embed_max_size=16,
    dual_attention_layers=(0,),
    qk_norm="rms_norm",
)
TINY_WAN = WanConfig(num_attention_heads=2, attention_head_dim=16, text_dim=24, ffn_dim=64, num_layers=2)


@dataclass(frozen=True)
class Workload:
    """A network and its batches: request i of a batch has latent shape `shapes[i * len(shapes) // batch]`, so that equal shapes are neighbours.

    `prompt` tokens are the pipelines': 77 of CLIP and 256 of T5 for SD3, 512 of T5 for Wan.
    """

    name: str
    config: SD3Config | WanConfig
    shapes: tuple[tuple[int, ...], ...]
    prompt: int
    batches: tuple[int, ...]

    def shapes_of(self, batch: int) -> list[tuple[int, ...]]:
        return [self.shapes[i * len(self.shapes) // batch] for i in range(batch)]


WORKLOADS: dict[str, tuple[Workload, ...]] = {
    "full": (
        Workload("sd35-medium-512", SD35_MEDIUM, ((16, 64, 64),), 333, (1, 2, 4, 8, 16)),
        Workload("sd35-medium-1024", SD35_MEDIUM, ((16, 128, 128),), 333, (1, 2, 4, 8)),
        Workload("sd35-medium-mixed", SD35_MEDIUM, ((16, 64, 64), (16, 64, 96), (16, 96, 96), (16, 128, 128)), 333, (4, 8, 16)),
        Workload("wan-1.3b-240x416x33", WAN_1_3B, ((16, 9, 30, 52),), 512, (1, 2, 4, 8)),
    ),
    "tiny": (
        Workload("sd35-tiny", TINY_SD3, ((16, 16, 16),), 7, (2,)),
        Workload("sd35-tiny-mixed", TINY_SD3, ((16, 16, 16), (16, 8, 16)), 7, (3,)),
        Workload("wan-tiny", TINY_WAN, ((16, 3, 8, 8),), 9, (2,)),
    ),
}


class Networks:
    """Our network, eager and with compiled blocks, and diffusers', all on the same parameters."""

    def __init__(self, config: SD3Config | WanConfig, device: torch.device, dtype: torch.dtype, seed: int = 0) -> None:
        from diffusers import SD3Transformer2DModel, WanTransformer3DModel

        def build() -> PackedModel:
            return SD3Transformer(config) if isinstance(config, SD3Config) else WanTransformer(config)

        theirs: Any = SD3Transformer2DModel if isinstance(config, SD3Config) else WanTransformer3DModel
        with device:
            self.eager = build().to(dtype).eval().requires_grad_(False)
            generator = torch.Generator(device).manual_seed(seed)
            for name, parameter in self.eager.named_parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=0.02, generator=generator)
                elif "norm" not in name:
                    nn.init.zeros_(parameter)
            # not cast as a whole: Wan's rotary tables stay in fp32, as from_pretrained keeps them
            self.diffusers = theirs(**config.to_dict()).eval().requires_grad_(False)
        with torch.device("meta"):
            self.compiled = build().eval().requires_grad_(False)
        state = self.eager.state_dict()
        for other in (self.compiled, self.diffusers):
            other.load_state_dict(state, assign=True)
        self.compiled.compile_blocks()


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass; requests of one shape are neighbours."""

    latents: list[Tensor]
    t: Tensor
    prompt_embeds: Tensor
    pooled: Tensor

    @classmethod
    def of(cls, workload: Workload, size: int, device: torch.device, dtype: torch.dtype) -> Batch:
        g = torch.Generator(device).manual_seed(size)
        config = workload.config
        text, pooled = (config.joint_attention_dim, config.pooled_projection_dim) if isinstance(config, SD3Config) else (config.text_dim, 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g, device=device).to(dtype)

        latents = [draw(*shape) for shape in workload.shapes_of(size)]
        return cls(latents, torch.rand(size, generator=g, device=device), draw(size, workload.prompt, text), draw(size, pooled))

    @property
    def even(self) -> bool:
        return len({x.shape for x in self.latents}) == 1

    def ours(self, model: PackedModel) -> list[Tensor]:
        """One packed forward."""
        latents: Tensor | list[Tensor] = torch.stack(self.latents) if self.even else self.latents
        pooled = {"pooled": self.pooled} if isinstance(model, SD3Transformer) else {}
        return list(model(latents, self.t, self.prompt_embeds, **pooled))

    def diffusers(self, model: Any) -> list[Tensor]:
        """One forward for each shape, since diffusers cannot mix them."""
        out: list[Tensor] = []
        runs = [list(run) for _, run in groupby(range(len(self.latents)), key=lambda i: self.latents[i].shape)]
        for run in runs:
            rows = slice(run[0], run[-1] + 1)
            x, t, embeds = torch.stack(self.latents[rows]), 1000 * self.t[rows], self.prompt_embeds[rows]
            sd3 = hasattr(model, "context_embedder")
            out += list(model(x, embeds, self.pooled[rows], t).sample if sd3 else model(x, t, embeds).sample)
        return out
