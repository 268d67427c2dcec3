"""What training keeps for its backward pass, as the planner counts it, against the tensors that autograd really keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from diffusion.config import LoRAConfig
from diffusion.families.base import PackedModel
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from diffusion.lora import add_lora
from diffusion.precision import autocast, itemsize

SD3 = SD3Config(
    sample_size=32,
    in_channels=4,
    out_channels=4,
    num_layers=4,
    attention_head_dim=32,
    num_attention_heads=6,
    joint_attention_dim=40,
    caption_projection_dim=192,
    pooled_projection_dim=40,
    pos_embed_max_size=24,
)
SD35 = replace(SD3, qk_norm="rms_norm", dual_attention_layers=(0, 1))
WAN = WanConfig(num_attention_heads=6, attention_head_dim=32, in_channels=4, out_channels=4, text_dim=40, ffn_dim=500, num_layers=3)
WAN_I2V = replace(WAN, in_channels=8, image_dim=40, added_kv_proj_dim=192)
COSMOS = CosmosConfig(
    in_channels=5,
    out_channels=4,
    num_attention_heads=6,
    attention_head_dim=32,
    num_layers=3,
    mlp_ratio=2.5,
    text_embed_dim=72,
    adaln_lora_dim=24,
    extra_pos_embed_type=None,
    use_crossattn_projection=True,
    crossattn_proj_in_channels=40,
    encoder_hidden_states_channels=72,
)
ROWS, TEXT = 2, 23
Config = SD3Config | WanConfig | CosmosConfig


def network(config: Config) -> PackedModel:
    if isinstance(config, SD3Config):
        return SD3Transformer(config)
    return WanTransformer(config) if isinstance(config, WanConfig) else CosmosTransformer(config)


def inputs(model: PackedModel) -> tuple[torch.Tensor, ...]:
    shape = (4, 20, 22) if isinstance(model, SD3Transformer) else (4, 2, 14, 18)
    given = torch.randn(ROWS, *shape), torch.rand(ROWS), torch.randn(ROWS, TEXT, 40)
    if isinstance(model, SD3Transformer):
        return (*given, torch.randn(ROWS, 40))
    if isinstance(model, WanTransformer) and model.config.image_tokens:
        return (*given, torch.randn(ROWS, model.config.image_tokens, 40), torch.randn(ROWS, *shape))
    return given


def kept(model: PackedModel, given: tuple[torch.Tensor, ...], dtype: str) -> tuple[int, int]:
    """Bytes of storages that a forward pass keeps beside its inputs and the weights: of activations, and of casts of weights."""
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    known = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), *given)}
    alive: dict[int, torch.Tensor] = {}
    casts: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        weight = tensor.dtype != torch.float32 and tuple(tensor.shape[-2:]) in shapes
        key = tensor.untyped_storage()._cdata
        if key not in known:
            (casts if weight else alive)[key] = tensor
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor), autocast(dtype, torch.device("cpu")):
        model(*given)
    activations, weights = (sum(tensor.untyped_storage().nbytes() for tensor in found.values()) for found in (alive, casts))
    return activations, weights


@pytest.mark.filterwarnings("ignore:Mismatch dtype")
@pytest.mark.parametrize("rank", [0, 2], ids=["full", "adapter"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("config", [SD3, SD35, WAN, WAN_I2V, COSMOS], ids=["sd3", "sd3.5", "wan", "wan i2v", "cosmos"])
def test_what_is_kept_without_recomputing(config: Config, dtype: str, rank: int) -> None:
    model = network(config)
    if rank:
        add_lora(model, LoRAConfig(rank=rank), torch.Generator())
    given = inputs(model)
    saved = model.saved(given[0].shape[1:], TEXT, itemsize(dtype), rank > 0)
    planned = ROWS * (sum(saved.blocks) + saved.ends)
    activations, casts = kept(model, given, dtype)
    assert planned == pytest.approx(activations, rel=0.04)
    if rank and dtype == "bfloat16":
        assert 2 * sum(saved.weights) == pytest.approx(casts, rel=0.12)  # the first block's input has no gradient


class Recomputed(nn.Module):
    """A block that keeps its input only."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *given: object) -> object:
        return checkpoint(self.block, *given, use_reentrant=False)


@pytest.mark.parametrize("config", [SD35, WAN, COSMOS], ids=["sd3.5", "wan", "cosmos"])
def test_what_is_kept_when_blocks_are_recomputed(config: Config) -> None:
    model = network(config)
    given = inputs(model)
    saved = model.saved(given[0].shape[1:], TEXT, 4, False)
    for i, block in enumerate(model.blocks):
        model.blocks[i] = Recomputed(block)
    planned = ROWS * (sum(saved.inputs) + saved.ends)
    assert planned == pytest.approx(kept(model, given, "float32")[0], rel=0.1)
