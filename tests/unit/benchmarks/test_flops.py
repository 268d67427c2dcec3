"""The analytic operation count against torch's counter of the operations that run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks.workloads import SD35_MEDIUM, TINY_SD3, TINY_WAN, WAN_1_3B, WORKLOADS
from diffusion.families.base import PackedModel
from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import CosmosTransformer
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from tests.unit.diffusion.cosmos import TINY as TINY_COSMOS

COSMOS: dict[str, Any] = {
    "in_channels": 17,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
    "use_crossattn_projection": True,
    "crossattn_proj_in_channels": 100352,
}


Config = SD3Config | WanConfig | CosmosConfig


def network(config: Config) -> PackedModel:
    if isinstance(config, SD3Config):
        return SD3Transformer(config)
    return WanTransformer(config) if isinstance(config, WanConfig) else CosmosTransformer(config)


def forward_flops(config: Config, shape: tuple[int, ...], prompt: int) -> int:
    with torch.device("meta"):
        return network(config).forward_flops(shape, prompt)


def extra(config: Config, shape: tuple[int, ...]) -> list[Tensor]:
    """What a network is given behind latents, times and prompt."""
    if isinstance(config, SD3Config):
        return [torch.zeros(1, config.pooled_projection_dim)]
    if isinstance(config, WanConfig) and config.image_dim is not None:
        return [torch.zeros(1, config.image_tokens, config.image_dim), torch.zeros(1, config.condition_channels, *shape[1:])]
    return []


def counted(config: Config, shape: tuple[int, ...], prompt: int) -> int:
    """Operations of a forward pass of one request on the meta device, where attention is counted as a product."""
    with torch.device("meta"):
        model = network(config)
        text = int(getattr(config, {SD3Config: "joint_attention_dim", WanConfig: "text_dim"}.get(type(config), "prompt_channels")))
        inputs = [torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, prompt, text), *extra(config, shape)]
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(*inputs)
    return counter.get_total_flops()


@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    prompt=st.integers(1, 9),
    layers=st.integers(1, 3),
    dual=st.sets(st.integers(0, 2)),
    out=st.sampled_from([None, 5]),
)
@settings(max_examples=15)
def test_sd3(rows: int, columns: int, prompt: int, layers: int, dual: set[int], out: int | None) -> None:
    changes = {"num_layers": layers, "dual_attention_layers": tuple(sorted(dual)), "out_channels": out}
    config = SD3Config(**{**TINY_SD3.to_dict(), **changes})
    shape = (config.in_channels, 2 * rows, 2 * columns)
    assert forward_flops(config, shape, prompt) == counted(config, shape, prompt)


@given(frames=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 4), prompt=st.integers(1, 9), layers=st.integers(1, 3))
@settings(max_examples=15)
def test_wan(frames: int, rows: int, columns: int, prompt: int, layers: int) -> None:
    config = WanConfig(**{**TINY_WAN.to_dict(), "patch_size": (1, 2, 2), "num_layers": layers})
    shape = (config.in_channels, frames, 2 * rows, 2 * columns)
    assert forward_flops(config, shape, prompt) == counted(config, shape, prompt)


@given(frames=st.integers(1, 3), rows=st.integers(1, 4), columns=st.integers(1, 4), prompt=st.integers(1, 9), layers=st.integers(1, 3), projected=st.booleans())
@settings(max_examples=15)
def test_cosmos(frames: int, rows: int, columns: int, prompt: int, layers: int, projected: bool) -> None:
    config = CosmosConfig.from_dict({**TINY_COSMOS, "num_layers": layers, "use_crossattn_projection": projected})
    shape = (config.out_channels, frames, 2 * rows, 2 * columns)
    assert forward_flops(config, shape, prompt) == counted(config, shape, prompt)


def test_wan_with_a_picture() -> None:
    config = WanConfig(**{**TINY_WAN.to_dict(), "patch_size": (1, 2, 2), "in_channels": 12, "out_channels": 4, "image_dim": 20})
    config = replace(config, added_kv_proj_dim=config.inner_dim)
    assert forward_flops(config, (4, 3, 4, 6), 7) == counted(config, (4, 3, 4, 6), 7)


@pytest.mark.parametrize(("config", "shape", "prompt"), [(SD35_MEDIUM, (16, 128, 128), 333), (WAN_1_3B, (16, 9, 30, 52), 512)], ids=["sd35", "wan"])
def test_the_sizes_that_are_measured(config: Config, shape: tuple[int, ...], prompt: int) -> None:
    assert forward_flops(config, shape, prompt) == counted(config, shape, prompt)


def test_the_networks_have_the_public_sizes() -> None:
    with torch.device("meta"):
        sd35, wan = SD3Transformer(SD35_MEDIUM), WanTransformer(WAN_1_3B)
    assert round(sum(p.numel() for p in sd35.parameters()) / 1e9, 1) == 2.2  # SD3.5-medium: 2.5 B with its persistent position table
    assert round(sum(p.numel() for p in wan.parameters()) / 1e9, 1) == 1.4


@pytest.mark.parametrize(
    ("config", "parameters", "tensors"),
    [
        (WAN_1_3B, 1_418_996_800, 825),
        (WanConfig(), 14_288_491_584, 1095),
        (WanConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120), 16_394_878_784, 1303),
        (WanConfig(in_channels=36, image_dim=1280, added_kv_proj_dim=5120, pos_embed_seq_len=514), 16_395_536_704, 1304),
        (WanConfig(num_attention_heads=24, num_layers=30, ffn_dim=14336, in_channels=48, out_channels=48), 4_999_787_712, 825),
        (CosmosConfig(**COSMOS, num_attention_heads=16, num_layers=28), 2_059_174_912, 569),
        (CosmosConfig(**COSMOS, num_attention_heads=40, num_layers=36), 14_368_047_104, 729),
    ],
    ids=["wan 1.3B", "wan 14B", "wan i2v 14B", "wan flf2v 14B", "wan ti2v 5B", "cosmos 2B", "cosmos 14B"],
)
def test_video_networks_have_the_published_sizes(config: Config, parameters: int, tensors: int) -> None:
    """Counted on diffusers' classes with the configurations of its conversion scripts (diffusers 58eb52c)."""
    with torch.device("meta"):
        model = network(config)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert len(model.state_dict()) == tensors


def test_equal_shapes_are_neighbours() -> None:
    mixed = next(w for w in WORKLOADS["full"] if len(w.shapes) > 1)
    shapes = mixed.shapes_of(8)
    assert [shapes.count(s) for s in mixed.shapes] == [2, 2, 2, 2]
    assert shapes == sorted(shapes, key=mixed.shapes.index)
