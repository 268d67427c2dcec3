"""The packed Wan network against diffusers', and packed against one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.families.wan.config import WanConfig
from diffusion.families.wan.network import WanTransformer
from tests.unit.diffusion.peak import PeakBytes

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLIPS = [(1, 8, 8), (3, 4, 12), (5, 2, 2), (1, 8, 8)]
LENGTHS = [5, 1, 7, 3]
TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 8,
    "ffn_dim": 32,
    "num_layers": 2,
    "rope_max_seq_len": 16,
}


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    return {
        **TINY,
        "patch_size": draw(st.sampled_from([(1, 2, 2), (1, 1, 1), (2, 1, 2)])),
        "num_attention_heads": draw(st.integers(1, 3)),
        "attention_head_dim": draw(st.sampled_from([8, 12, 14])),
        "in_channels": draw(st.integers(2, 4)),
        "out_channels": draw(st.sampled_from([None, 2])),
        "num_layers": draw(st.integers(1, 3)),
        "cross_attn_norm": draw(st.booleans()),
    }


def diffusers_model(architecture: dict[str, Any], seed: int = 0) -> WanTransformer3DModel:
    """diffusers' network with its own random weights; norm gains moved away from one."""
    torch.manual_seed(seed)
    model = WanTransformer3DModel(**architecture).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name and parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def wan(seed: int = 0, **keys: Any) -> WanTransformer:
    theirs = diffusers_model({**TINY, **keys}, seed)
    model = WanTransformer(WanConfig(**{**TINY, **keys})).eval()
    model.load_state_dict(theirs.state_dict(), strict=True)
    return model


def requests(config: WanConfig, clips: list[tuple[int, ...]], lengths: list[int], seed: int = 1) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Clips of these sizes with unequal times and texts."""
    g = torch.Generator().manual_seed(seed)
    latents = [torch.randn(config.latent_channels, *clip, generator=g) for clip in clips]
    return latents, torch.rand(len(clips), generator=g), [torch.randn(n, config.text_dim, generator=g) for n in lengths]


# -- parity with diffusers ------------------------------------------------------------------------------------------


@given(architecture=architectures(), grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), seed=st.integers(0, 99))
@settings(max_examples=15)
@torch.no_grad()
def test_velocities_and_state_dicts_are_diffusers(architecture: dict[str, Any], grid: tuple[int, ...], seed: int) -> None:
    theirs = diffusers_model(architecture, seed)
    config = WanConfig.from_dict(dict(theirs.config))
    ours = WanTransformer(config).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    back = WanTransformer3DModel(**architecture)
    back.load_state_dict(ours.state_dict(), strict=True)

    size = tuple(n * p for n, p in zip(grid, config.patch_size, strict=True))
    latents, t, embeds = requests(config, [size] * 3, [4] * 3, seed)
    beside = torch.randn(3, config.condition_channels, *size)
    expected = back.eval()(torch.cat([torch.stack(latents), beside], 1), 1000 * t, torch.stack(embeds)).sample
    condition = beside if ours.needs_picture else None
    torch.testing.assert_close(ours(torch.stack(latents), t, torch.stack(embeds), condition=condition), expected, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("mixed", ["clips", "lengths", "both", "neither"])
def test_a_mixed_pack_is_diffusers_one_by_one(mixed: str, buckets: int | None) -> None:
    ours, theirs = wan(), diffusers_model(TINY)
    clips = CLIPS if mixed in ("clips", "both") else [(3, 4, 4)] * 4
    latents, t, embeds = requests(ours.config, clips, LENGTHS if mixed in ("lengths", "both") else [6] * 4)
    ours.buckets = buckets
    packed = ours(latents, t, embeds)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        alone = theirs(x[None], 1000 * t[i : i + 1], e[None]).sample[0]
        assert alone.abs().max() > 1e-2
        torch.testing.assert_close(packed[i], alone, **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
def test_clips_of_one_length_and_unequal_shape_get_their_own_positions(buckets: int | None) -> None:
    """Equal token counts stand as rows, but their grids differ."""
    ours, theirs = wan(), diffusers_model(TINY)
    ours.buckets = buckets
    latents, t, embeds = requests(ours.config, [(1, 4, 8), (2, 4, 4), (1, 8, 4)], [4] * 3)
    packed = ours(latents, t, embeds)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        torch.testing.assert_close(packed[i], theirs(x[None], 1000 * t[i : i + 1], e[None]).sample[0], **CLOSE)


def test_gradients_are_diffusers() -> None:
    ours, theirs = wan(), diffusers_model(TINY)
    latents, t, embeds = requests(ours.config, [(3, 4, 4)] * 3, [4] * 3)
    ours(latents, t, embeds)[0].square().sum().backward()
    theirs(latents[0][None], 1000 * t[:1], embeds[0][None]).sample.square().sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)


# -- image-to-video -------------------------------------------------------------------------------------------------

I2V: dict[str, Any] = {"in_channels": 12, "image_dim": 6, "added_kv_proj_dim": 24}
"""4 sampled channels, and a condition of 4 + 4: mask and encoded image."""


def images(clips: list[tuple[int, ...]], tokens: int = 257, seed: int = 2) -> tuple[list[Tensor], list[Tensor]]:
    """Features and conditions."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(tokens, 6, generator=g) for _ in clips], [torch.randn(8, *clip, generator=g) for clip in clips]


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("clips", [CLIPS, [(3, 4, 4)] * 4], ids=["mixed", "even"])
def test_an_image_conditions_as_in_diffusers(clips: list[tuple[int, ...]], buckets: int | None) -> None:
    ours, theirs = wan(**I2V), diffusers_model({**TINY, **I2V})
    ours.buckets = buckets
    latents, t, embeds = requests(ours.config, clips, [512] * 4)  # the split of text and image inside diffusers' attention is at 512
    features, conditions = images(clips)
    even = len(set(clips)) == 1
    found = ours(torch.stack(latents) if even else latents, t, torch.stack(embeds), torch.stack(features), torch.stack(conditions) if even else conditions)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        alone = theirs(torch.cat([x, conditions[i]])[None], 1000 * t[i : i + 1], e[None], features[i][None]).sample[0]
        torch.testing.assert_close(found[i], alone, **CLOSE)
    other = ours(latents, t, embeds, features[::-1], conditions)
    assert not torch.allclose(other[0], found[0], atol=1e-3)


@torch.no_grad()
def test_first_and_last_image_have_positions() -> None:
    keys = {**I2V, "pos_embed_seq_len": 514}
    theirs = diffusers_model({**TINY, **keys})
    torch.nn.init.normal_(theirs.condition_embedder.image_embedder.pos_embed)
    ours = WanTransformer(WanConfig(**{**TINY, **keys})).eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    latents, t, embeds = requests(ours.config, [(3, 4, 4)], [512])
    features, conditions = images([(3, 4, 4)], tokens=514)
    # diffusers takes the two images as two rows of a batch
    expected = theirs(torch.cat([latents[0], conditions[0]])[None], 1000 * t, embeds[0][None], features[0].unflatten(0, (2, 257))).sample
    torch.testing.assert_close(ours(latents, t, embeds, features, conditions)[0], expected[0], **CLOSE)


def test_gradients_with_an_image_are_diffusers() -> None:
    ours, theirs = wan(**I2V), diffusers_model({**TINY, **I2V})
    latents, t, embeds = requests(ours.config, [(3, 4, 4)] * 2, [512] * 2)
    features, conditions = images([(3, 4, 4)] * 2)
    ours(latents, t, embeds, features, conditions)[0].square().sum().backward()
    theirs(torch.cat([latents[0], conditions[0]])[None], 1000 * t[:1], embeds[0][None], features[0][None]).sample.square().sum().backward()
    expected = {n: p.grad for n, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize(("clips", "frames"), [(CLIPS, [0, 1, 2, 0]), ([(3, 4, 4)] * 4, [1] * 4)], ids=["mixed", "even"])
def test_given_frames_have_a_time_of_their_own(clips: list[tuple[int, ...]], frames: list[int], buckets: int | None) -> None:
    """As diffusers' TI2V-5B, which is given the time of every token."""
    ours, theirs = wan(), diffusers_model(TINY)
    ours.buckets = buckets
    latents, t, embeds = requests(ours.config, clips, LENGTHS)
    fixed, free = [x[:, :k] for x, k in zip(latents, frames, strict=True)], [x[:, k:] for x, k in zip(latents, frames, strict=True)]
    even = len(set(frames)) == 1
    found = ours(torch.stack(free) if even else free, t, embeds, given=torch.stack(fixed) if even else fixed)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        times = 1000 * t[i] * torch.ones(x.shape[1], x.shape[2] // 2, x.shape[3] // 2)
        times[: frames[i]] = 0
        alone = theirs(x[None], times.flatten()[None], e[None]).sample[0]
        torch.testing.assert_close(found[i], alone[:, frames[i] :], **CLOSE)


def test_features_and_a_network_for_them_belong_together() -> None:
    ours, plain = wan(**I2V), wan()
    latents, t, embeds = requests(ours.config, [(3, 4, 4)], [4])
    features, conditions = images([(3, 4, 4)])
    with pytest.raises(ValueError, match="belong together"):
        ours(latents, t, embeds, condition=conditions)
    with pytest.raises(ValueError, match="belong together"):
        plain(latents, t, embeds, features)
    for network, condition in ((ours, None), (plain, conditions)):
        with pytest.raises(ValueError, match="channels for it beside the latents do not fit"):
            network(latents, t, embeds, condition=condition)


# -- packing --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("even", [False, True], ids=["mixed", "even"])
@pytest.mark.parametrize("poisoned", ["latents", "embeds", "t"])
def test_a_nan_request_does_not_leak(poisoned: str, even: bool, buckets: int | None) -> None:
    model = wan()
    model.buckets = buckets
    latents, t, embeds = requests(model.config, [(3, 4, 4)] * 4 if even else CLIPS, [6] * 4 if even else LENGTHS)
    for culprit in (1, 3):
        clean = model(latents, t, embeds)
        dirty_inputs = {"latents": [x.clone() for x in latents], "t": t.clone(), "embeds": [e.clone() for e in embeds]}
        dirty_inputs[poisoned][culprit].fill_(torch.nan)
        dirty = model(dirty_inputs["latents"], dirty_inputs["t"], dirty_inputs["embeds"])
        assert dirty[culprit].isnan().any()
        for i in set(range(4)) - {culprit}:
            torch.testing.assert_close(dirty[i], clean[i], **CLOSE)


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32() -> None:
    model = wan()
    inputs = requests(model.config, CLIPS, LENGTHS)
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    for a, b in zip(exact, rough, strict=True):
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


@torch.no_grad()
def test_bf16_weights_are_as_near_to_fp32_as_diffusers() -> None:
    ours, theirs = wan(), diffusers_model(TINY)
    latents, t, embeds = requests(ours.config, [(3, 4, 8)] * 3, [6] * 3)
    exact = torch.stack(ours(latents, t, embeds))
    rope = theirs.rope
    theirs.to(torch.bfloat16).rope = rope.float()
    half = torch.stack(latents).bfloat16(), torch.stack(embeds).bfloat16()
    expected = theirs(half[0], 1000 * t, half[1]).sample
    found = ours.to(torch.bfloat16)(half[0], t, half[1])
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() < 2 * (expected - exact).square().mean()
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


# -- counts, refusals and configuration -----------------------------------------------------------------------------


def test_token_counts() -> None:
    model = wan()
    assert model.tokens((4, 3, 8, 12)) == model.packed_tokens((4, 3, 8, 12), 512) == 3 * 4 * 6
    with pytest.raises(ValueError, match="3x8x13 is not a multiple of the patch size 1x2x2"):
        model.tokens((4, 3, 8, 13))
    with pytest.raises(ValueError, match=r"shape \(4, 8, 8\) does not fit: this model takes \(4 channels, frames, height, width\)"):
        model.tokens((4, 8, 8))


def test_a_grid_beyond_the_rotary_table_is_refused() -> None:
    model = wan()
    with pytest.raises(ValueError, match="17x1x1 patches exceed rope_max_seq_len=16"):
        model(*requests(model.config, [(17, 2, 2)], [3]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clips", [[(3, 8, 8)] * 4, [(3, 8, 8), (3, 8, 8), (1, 4, 4), (2, 8, 4)]], ids=["even", "mixed"])
def test_the_memory_planner_gets_an_upper_bound_that_is_not_far_off(clips: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    model = wan(num_attention_heads=4, attention_head_dim=32, ffn_dim=700)
    inputs = requests(model.config, clips * 4, [3] * len(clips) * 4)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), PeakBytes() as peak:
        model(*inputs)
    weights = sum(p.numel() for p in model.parameters()) * 2 if dtype != torch.float32 else 0  # what autocast keeps of them
    found = (peak.peak - weights) / sum(model.tokens(x.shape) for x in inputs[0])
    bound = model.activation_bytes(dtype.itemsize)
    assert bound / 3 < found < bound


@given(architecture=architectures())
@settings(max_examples=25)
def test_config_round_trip(architecture: dict[str, Any]) -> None:
    config = WanConfig.from_dict({"_class_name": "WanTransformer3DModel", "_diffusers_version": "0.42.1", **architecture})
    assert config == WanConfig(**architecture)
    assert WanConfig.from_dict(config.to_dict()) == config


def test_config_defaults_are_diffusers() -> None:
    import inspect

    theirs = {k: p.default for k, p in inspect.signature(WanTransformer3DModel.__init__).parameters.items() if k != "self"}
    assert WanConfig(**theirs) == WanConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window_size": [-1, -1]}, "keys this model does not know: window_size"),
        ({"added_kv_proj_dim": 24}, "image_dim=None and added_kv_proj_dim=24 belong together"),
        ({"image_dim": 1280}, "image_dim=1280 and added_kv_proj_dim=None belong together"),
        ({"image_dim": 1280, "added_kv_proj_dim": 5}, "added_kv_proj_dim=5 must be the network's width, 24"),
        ({"out_channels": 5}, "out_channels=5 exceeds in_channels=4"),
        ({"qk_norm": None}, "qk_norm=None is not known"),
        ({"patch_size": [2, 2]}, "must have three edges"),
    ],
)
def test_config_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WanConfig.from_dict({**WanConfig(**TINY).to_dict(), **change})


@torch.no_grad()
def test_fresh_weights_predict_zero_and_follow_their_seed() -> None:
    def fresh(seed: int) -> WanTransformer:
        model = WanTransformer(WanConfig(**TINY))
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    a, b, c = (fresh(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    model = fresh(0)
    assert not any(x.any() for x in model(*requests(model.config, CLIPS, LENGTHS)))
