"""The analytic operation count against torch's counter of the operations that run."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.networks.workloads import SD35_MEDIUM, TINY_SD3, TINY_WAN, WAN_1_3B, WORKLOADS
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer


def forward_flops(config: SD3Config | WanConfig, shape: tuple[int, ...], prompt: int) -> int:
    with torch.device("meta"):
        model = SD3Transformer(config) if isinstance(config, SD3Config) else WanTransformer(config)
    return model.forward_flops(shape, prompt)


def counted(config: SD3Config | WanConfig, shape: tuple[int, ...], prompt: int) -> int:
    """Operations of a forward pass of one request on the meta device, where attention is counted as a product."""
    with torch.device("meta"):
        model = SD3Transformer(config) if isinstance(config, SD3Config) else WanTransformer(config)
        text = config.joint_attention_dim if isinstance(config, SD3Config) else config.text_dim
        inputs = [torch.zeros(1, *shape), torch.zeros(1), torch.zeros(1, prompt, text)]
        if isinstance(config, SD3Config):
            inputs.append(torch.zeros(1, config.pooled_projection_dim))
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


@pytest.mark.parametrize(("config", "shape", "prompt"), [(SD35_MEDIUM, (16, 128, 128), 333), (WAN_1_3B, (16, 9, 30, 52), 512)], ids=["sd35", "wan"])
def test_the_sizes_that_are_measured(config: SD3Config | WanConfig, shape: tuple[int, ...], prompt: int) -> None:
    assert forward_flops(config, shape, prompt) == counted(config, shape, prompt)


def test_the_networks_have_the_public_sizes() -> None:
    with torch.device("meta"):
        sd35, wan = SD3Transformer(SD35_MEDIUM), WanTransformer(WAN_1_3B)
    assert round(sum(p.numel() for p in sd35.parameters()) / 1e9, 1) == 2.2  # SD3.5-medium: 2.5 B with its persistent position table
    assert round(sum(p.numel() for p in wan.parameters()) / 1e9, 1) == 1.4


def test_equal_shapes_are_neighbours() -> None:
    mixed = next(w for w in WORKLOADS["full"] if len(w.shapes) > 1)
    shapes = mixed.shapes_of(8)
    assert [shapes.count(s) for s in mixed.shapes] == [2, 2, 2, 2]
    assert shapes == sorted(shapes, key=mixed.shapes.index)
