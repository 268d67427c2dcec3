"""Compiled per-token regions: nothing compiles anew within a bucket, and the numbers are those of eager code."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from diffusion.families.base import PackedModel
from diffusion.families.sd3.network import SD3Config, SD3Transformer
from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer

SD3 = SD3Config(
    sample_size=16,
    patch_size=2,
    in_channels=3,
    out_channels=3,
    num_layers=4,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=12,
    caption_projection_dim=16,
    pooled_projection_dim=6,
    pos_embed_max_size=8,
    qk_norm="rms_norm",
    dual_attention_layers=(0, 1),
)
WAN = WanConfig(num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=12, freq_dim=8, ffn_dim=32, num_layers=3)

Mix = list[tuple[tuple[int, ...], int]]
"""Latent size and prompt length of each request. Below: 145 to 160 image and 25 or 26 text tokens (SD3), 65 to 72 and 25 or 26 (Wan)."""
MIXES: dict[str, list[Mix]] = {
    "sd3": [
        [((8, 8), 5), ((4, 12), 6), ((16, 16), 7), ((16, 16), 8)],
        [((16, 16), 5), ((8, 8), 5), ((16, 16), 6), ((4, 8), 7), ((4, 2), 3)],
        [((16, 16), 11), ((16, 16), 11), ((4, 8), 1), ((4, 8), 1), ((2, 2), 1), ((2, 2), 1)],
    ],
    "wan": [
        [((1, 8, 8), 5), ((3, 4, 12), 6), ((5, 4, 4), 15)],
        [((3, 8, 8), 13), ((1, 8, 8), 12), ((1, 4, 2), 1)],
        [((3, 8, 8), 20), ((3, 4, 4), 4), ((2, 4, 4), 1)],
    ],
}


def build(kind: str) -> PackedModel:
    model: PackedModel = SD3Transformer(SD3) if kind == "sd3" else WanTransformer(WAN)
    g = torch.Generator().manual_seed(0)
    model.init_weights(g)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=g)
    return model.eval()


def requests(mix: Mix, seed: int) -> dict[str, Any]:
    """Clips where sizes have frames, and then no pooled text."""
    g = torch.Generator().manual_seed(seed)
    given: dict[str, Any] = {
        "latents": [torch.randn(3, *size, generator=g) for size, _ in mix],
        "t": torch.rand(len(mix), generator=g),
        "prompt_embeds": [torch.randn(n, 12, generator=g) for _, n in mix],
    }
    return given if len(mix[0][0]) == 3 else given | {"pooled": torch.randn(len(mix), 6, generator=g)}


def close(found: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert b.abs().max() > 1e-2
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(autouse=True)
def _no_pool_of_compilers() -> Iterator[None]:
    with torch._inductor.config.patch(compile_threads=1):
        yield


@pytest.mark.parametrize("kind", [pytest.param("sd3", marks=pytest.mark.long), "wan"])
@torch.no_grad()
def test_a_second_mix_in_the_same_bucket_compiles_nothing(kind: str) -> None:
    model = build(kind)
    eager = [model(**requests(mix, i)) for i, mix in enumerate(MIXES[kind])]
    model.buckets = 8
    model.compile_blocks()
    counters.clear()
    close(model(**requests(MIXES[kind][0], 0)), eager[0])
    warm = counters["stats"]["unique_graphs"]
    assert warm == {"sd3": 2 * 3, "wan": 3}[kind]  # regions x kinds of block (SD3: dual, plain, last), not x blocks
    for i, mix in enumerate(MIXES[kind][1:], 1):
        close(model(**requests(mix, i)), eager[i])
    assert counters["stats"]["unique_graphs"] == warm

    poisoned = requests(MIXES[kind][0], 0)
    poisoned["latents"][-1].fill_(torch.nan)
    dirty = model(**poisoned)
    assert dirty[-1].isnan().all()
    close(dirty[:-1], eager[0][:-1])


@pytest.mark.long
@torch.no_grad()
def test_more_shapes_than_the_compiler_keeps_by_default() -> None:
    """torch gives up on a function after 8 recompilations unless told otherwise; a day of mixed sizes has more."""
    model = build("wan")
    model.buckets = 8
    plain = build("wan")
    model.compile_blocks(backend="aot_eager")
    counters.clear()
    for i in range(1, 11):
        inputs = requests([((1, 2 * i, 2), 3), ((1, 2, 2), 3)], i)
        close(model(**inputs), plain(**inputs))
    assert counters["stats"]["unique_graphs"] == 3 * 10


@pytest.mark.parametrize("kind", ["sd3", "wan"])
@torch.no_grad()
def test_compiled_regions_follow_autocast(kind: str) -> None:
    model = build(kind)
    inputs = requests(MIXES[kind][0], 0)
    exact = model(**inputs)
    model.buckets = 8
    with torch.autocast("cpu", torch.bfloat16):
        eager = model(**inputs)
        model.compile_blocks(backend="aot_eager")
        found = model(**inputs)
    for a, b, c in zip(found, eager, exact, strict=True):
        assert (a.float() - c).square().mean() < 2 * (b.float() - c).square().mean()
    close(model(**inputs), exact)  # and back: fp32 outside
