"""The packed SD3 network against diffusers', and packed against one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.attention import Segments
from diffusion.families.sd3.network import SD3Config, SD3Transformer, sincos_table
from tests.unit.diffusion.peak import PeakBytes

Build = Callable[..., SD3Transformer]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
SIZES = [(8, 8), (4, 12), (16, 2), (8, 8)]
LENGTHS = [5, 1, 7, 3]


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    layers = draw(st.integers(1, 3))
    heads, head_dim = draw(st.integers(1, 3)), draw(st.sampled_from([4, 8]))
    return {
        "sample_size": draw(st.sampled_from([8, 12, 32])),
        "patch_size": draw(st.sampled_from([1, 2, 4])),
        "in_channels": draw(st.integers(1, 4)),
        "out_channels": draw(st.sampled_from([None, 2])),
        "num_layers": layers,
        "attention_head_dim": head_dim,
        "num_attention_heads": heads,
        "joint_attention_dim": draw(st.integers(3, 9)),
        "caption_projection_dim": heads * head_dim,
        "pooled_projection_dim": draw(st.integers(3, 9)),
        "pos_embed_max_size": draw(st.integers(4, 9)),
        "qk_norm": draw(st.sampled_from([None, "rms_norm"])),
        "dual_attention_layers": tuple(sorted(draw(st.sets(st.integers(0, layers - 1))))),
    }


def diffusers_model(architecture: dict[str, Any], seed: int = 0) -> SD3Transformer2DModel:
    """diffusers' network with its own random weights; norm gains moved away from one."""
    torch.manual_seed(seed)
    model = SD3Transformer2DModel(**architecture).eval()
    for name, parameter in model.named_parameters():
        if "norm_" in name and parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def conditioning(config: SD3Config, lengths: list[int], seed: int = 1) -> tuple[Tensor, list[Tensor], Tensor]:
    """Unequal times, prompt embeddings and pooled vectors of `len(lengths)` requests."""
    g = torch.Generator().manual_seed(seed)
    n = len(lengths)
    t = torch.rand(n, generator=g)
    embeds = [torch.randn(length, config.joint_attention_dim, generator=g) for length in lengths]
    return t, embeds, torch.randn(n, config.pooled_projection_dim, generator=g)


def latents_of(config: SD3Config, sizes: list[tuple[int, int]], seed: int = 2) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(config.in_channels, *size, generator=g) for size in sizes]


def requests(model: SD3Transformer) -> tuple[list[Tensor], Tensor, list[Tensor], Tensor]:
    """Four requests of mixed sizes, prompt lengths, times and pooled vectors."""
    t, embeds, pooled = conditioning(model.config, LENGTHS)
    return latents_of(model.config, SIZES), t, embeds, pooled


# -- parity with diffusers ------------------------------------------------------------------------------------------


@given(architecture=architectures(), rows=st.integers(1, 3), columns=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=15)
@torch.no_grad()
def test_velocities_and_state_dicts_are_diffusers(architecture: dict[str, Any], rows: int, columns: int, seed: int) -> None:
    theirs = diffusers_model(architecture, seed)
    config = SD3Config.from_dict(dict(theirs.config))
    ours = SD3Transformer(config).eval()
    table = "pos_embed.pos_embed"
    torch.testing.assert_close(ours.state_dict()[table], theirs.state_dict()[table], atol=1e-6, rtol=0)

    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = SD3Transformer2DModel(**architecture)
    back.load_state_dict(ours.state_dict(), strict=True)

    size = (rows * config.patch_size, columns * config.patch_size)
    latents = torch.stack(latents_of(config, [size] * 3, seed))
    t, embeds, pooled = conditioning(config, [4] * 3, seed)
    expected = back.eval()(latents, torch.stack(embeds), pooled, 1000 * t).sample
    torch.testing.assert_close(ours(latents, t, torch.stack(embeds), pooled), expected, **CLOSE)


@torch.no_grad()
def test_a_mixed_pack_is_diffusers_one_by_one(style: str, tiny_model: Build) -> None:
    ours = tiny_model(style)
    theirs = SD3Transformer2DModel(**ours.config.to_dict()).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    latents, t, embeds, pooled = requests(ours)
    packed = ours(latents, t, embeds, pooled)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        alone = theirs(x[None], e[None], pooled[i : i + 1], 1000 * t[i : i + 1]).sample[0]
        torch.testing.assert_close(packed[i], alone, **CLOSE)


@pytest.mark.parametrize(("dim", "grid", "base"), [(16, 8, 8), (96, 24, 24), (12, 7, 3), (64, 5, 9)])
def test_the_position_table_is_diffusers(dim: int, grid: int, base: int) -> None:
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    expected = get_2d_sincos_pos_embed(dim, grid, base_size=base, output_type="pt").float()
    torch.testing.assert_close(sincos_table(dim, grid, base)[0], expected, atol=1e-6, rtol=0)


# -- packing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8, 32])
@pytest.mark.parametrize("mixed", ["sizes", "lengths", "both", "neither"])
def test_packed_equals_one_by_one(mixed: str, buckets: int | None, style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    latents = latents_of(model.config, SIZES if mixed in ("sizes", "both") else [(8, 8)] * 4)
    t, embeds, pooled = conditioning(model.config, LENGTHS if mixed in ("lengths", "both") else [6] * 4)
    alone = [model(x[None], t[i : i + 1], e[None], pooled[i : i + 1])[0] for i, (x, e) in enumerate(zip(latents, embeds, strict=True))]
    model.buckets = buckets
    packed = model(latents, t, embeds, pooled)
    for a, b in zip(packed, alone, strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
    if mixed == "neither":
        torch.testing.assert_close(torch.stack(packed), model(torch.stack(latents), t, torch.stack(embeds), pooled), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("order", [[3, 2, 1, 0], [1, 0, 3, 2], [2, 3, 0, 1]])
def test_the_order_of_requests_does_not_matter(order: list[int], style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    latents, t, embeds, pooled = requests(model)
    straight = model(latents, t, embeds, pooled)
    shuffled = model([latents[i] for i in order], t[order], [embeds[i] for i in order], pooled[order])
    for place, i in enumerate(order):
        torch.testing.assert_close(shuffled[place], straight[i], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("even", [False, True], ids=["mixed", "even"])
@pytest.mark.parametrize("poisoned", ["latents", "embeds", "pooled", "t"])
def test_a_nan_request_does_not_leak(poisoned: str, even: bool, buckets: int | None, style: str, tiny_model: Build) -> None:
    """Neither to its neighbours nor, from the last request, through the padding behind it."""
    model = tiny_model(style)
    model.buckets = buckets
    for culprit in (1, 3):
        latents = latents_of(model.config, [(8, 8)] * 4 if even else SIZES)
        t, embeds, pooled = conditioning(model.config, [6] * 4 if even else LENGTHS)
        clean = model(latents, t, embeds, pooled)
        {"latents": latents, "embeds": embeds, "pooled": pooled, "t": t}[poisoned][culprit].fill_(torch.nan)
        dirty = model(latents, t, embeds, pooled)
        assert dirty[culprit].isnan().any()
        for i in {0, 1, 2, 3} - {culprit}:
            torch.testing.assert_close(dirty[i], clean[i], **CLOSE)


def test_gradients_with_padding_are_those_without(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    found = []
    for buckets in (None, 8):
        model.zero_grad()
        model.buckets = buckets
        torch.cat([v.flatten() for v in model(*requests(model))]).square().sum().backward()
        found.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gradients_do_not_cross_requests(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    latents, t, embeds, pooled = requests(model)
    for x in (*latents, *embeds):
        x.requires_grad_()
    model(latents, t, embeds, pooled)[1].square().sum().backward()
    for i in range(4):
        reached = [bool(x.grad is not None and x.grad.any()) for x in (latents[i], embeds[i])]
        assert reached == [i == 1] * 2


@torch.no_grad()
def test_time_pooled_prompt_and_place_all_matter(tiny_model: Build) -> None:
    model = tiny_model()
    x, t, e, p = torch.randn(1, 3, 8, 8), torch.tensor([0.3]), torch.randn(1, 5, 12), torch.randn(1, 6)
    base = model(x, t, e, p)
    for changed in (model(x, t + 0.1, e, p), model(x, t, e + 0.1, p), model(x, t, e, p + 0.1), model(x.roll(2, 3), t, e, p).roll(-2, 3)):
        assert (changed - base).abs().max() > 1e-4


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32(tiny_model: Build) -> None:
    model = tiny_model()
    latents, t, embeds, pooled = requests(model)
    exact = model(latents, t, embeds, pooled)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(latents, t, embeds, pooled)
    for a, b in zip(exact, rough, strict=True):
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


@torch.no_grad()
def test_bf16_weights_stay_near_fp32(style: str, tiny_model: Build) -> None:
    model = tiny_model(style)
    latents, t, embeds, pooled = requests(model)
    exact = model(latents, t, embeds, pooled)
    rough = model.to(torch.bfloat16)([x.bfloat16() for x in latents], t, [e.bfloat16() for e in embeds], pooled.bfloat16())
    for a, b in zip(exact, rough, strict=True):
        assert b.dtype == torch.bfloat16
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


def test_attention_gets_one_type_even_where_norms_compute_in_fp32(tiny_model: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast on a GPU runs `rms_norm` in fp32, on a CPU it does not; xformers and varlen_attn refuse mixed types."""
    from diffusion.families.sd3 import network as sd3

    seen: list[set[torch.dtype]] = []

    def attention(q: Tensor, k: Tensor, v: Tensor, segments: Segments, provider: str) -> Tensor:
        seen.append({q.dtype, k.dtype, v.dtype})
        return v

    monkeypatch.setattr(sd3, "varlen_attention", attention)
    model = tiny_model("sd35")
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.register_forward_hook(lambda module, inputs, output: output.float())
    latents, t, embeds, pooled = requests(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(latents, t, embeds, pooled)
    assert seen == [{torch.bfloat16}] * 3  # two joint attentions and the dual one


# -- refusals and configuration -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 8), (8, 9), (18, 8), (8, 18)])
@pytest.mark.parametrize("as_list", [False, True])
def test_a_size_that_does_not_fit_is_refused(size: tuple[int, int], as_list: bool, tiny_model: Build) -> None:
    model = tiny_model()
    x = torch.zeros(3, *size)
    with pytest.raises(ValueError, match=r"multiple of the patch size 2x2|exceed pos_embed_max_size=8"):
        model([x] if as_list else x[None], torch.zeros(1), torch.zeros(1, 5, 12), torch.zeros(1, 6))


def test_token_counts(tiny_model: Build) -> None:
    model = tiny_model()
    assert model.tokens((3, 8, 12)) == 4 * 6
    assert model.packed_tokens((3, 8, 12), 5) == 4 * 6 + 5
    for bad, message in (((3, 8, 13), "8x13 is not a multiple of the patch size 2x2"), ((3, 0, 8), "0x8 is not"), ((4, 8, 8), "3 channels, height, width")):
        with pytest.raises(ValueError, match=message):
            model.tokens(bad)
    with pytest.raises(ValueError, match=r"shape \(3, 1, 8, 8\) does not fit"):
        model.packed_tokens((3, 1, 8, 8), 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [[(32, 32)] * 4, [(32, 32), (32, 32), (16, 32), (8, 8)]], ids=["even", "mixed"])
@pytest.mark.parametrize("prompt", [3, 300])
def test_the_memory_planner_gets_an_upper_bound_that_is_not_far_off(
    style: str, sizes: list[tuple[int, int]], prompt: int, dtype: torch.dtype, tiny_model: Build
) -> None:
    wide = {"attention_head_dim": 32, "num_attention_heads": 4, "caption_projection_dim": 128, "pos_embed_max_size": 16}
    model = tiny_model(style, **wide)
    latents = latents_of(model.config, sizes)
    t, embeds, pooled = conditioning(model.config, [prompt] * 4)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), PeakBytes() as peak:
        model(latents, t, embeds, pooled)
    weights = sum(p.numel() for p in model.parameters()) * 2 if dtype != torch.float32 else 0  # what autocast keeps of them
    found = (peak.peak - weights) / sum(model.packed_tokens(x.shape, prompt) for x in latents)
    bound = model.activation_bytes(dtype.itemsize)
    assert bound / 3 < found < bound


def test_prompts_and_latents_must_be_as_many(tiny_model: Build) -> None:
    with pytest.raises(ValueError, match="2 image requests but 3 text requests"):
        tiny_model()(torch.zeros(2, 3, 8, 8), torch.zeros(2), torch.zeros(3, 5, 12), torch.zeros(2, 6))


@given(architecture=architectures())
@settings(max_examples=25)
def test_config_round_trip(architecture: dict[str, Any]) -> None:
    config = SD3Config.from_dict({"_class_name": "SD3Transformer2DModel", "_diffusers_version": "0.42.1", **architecture})
    assert config == SD3Config(**architecture)
    assert SD3Config.from_dict(config.to_dict()) == config


def test_config_defaults_are_diffusers() -> None:
    import inspect

    theirs = {k: p.default for k, p in inspect.signature(SD3Transformer2DModel.__init__).parameters.items() if k != "self"}
    assert SD3Config(**theirs) == SD3Config()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rope_theta": 1}, "keys this model does not know: rope_theta"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm' is not known"),
        ({"caption_projection_dim": 17}, "caption_projection_dim=17 must equal heads x head_dim = 16"),
    ],
)
def test_config_refusals(change: dict[str, Any], message: str, tiny_model: Build) -> None:
    with pytest.raises(ValueError, match=message):
        SD3Config.from_dict({**tiny_model().config.to_dict(), **change})


@torch.no_grad()
def test_fresh_weights_predict_zero_and_follow_their_seed() -> None:
    def fresh(seed: int) -> SD3Transformer:
        model = SD3Transformer(SD3Config(num_layers=1, attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, pos_embed_max_size=8))
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    a, b, c = fresh(0), fresh(0), fresh(1)
    same = [torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True)]
    other = [torch.equal(x, y) for x, y in zip(a.parameters(), c.parameters(), strict=True)]
    assert all(same)
    assert not all(other)
    assert not a(torch.randn(2, 16, 4, 4), torch.rand(2), torch.randn(2, 3, 4096), torch.randn(2, 2048)).any()
