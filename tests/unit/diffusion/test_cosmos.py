"""The packed Cosmos network against diffusers', packed against one by one, and frames that are given."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from diffusers import CosmosTransformer3DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.families.cosmos.config import CosmosConfig
from diffusion.families.cosmos.network import GIVEN_TIME, CosmosTransformer
from tests.unit.diffusion.cosmos import TINY, diffusers_model, theirs
from tests.unit.diffusion.peak import PeakBytes

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
CLIPS = [(1, 8, 8), (3, 4, 12), (5, 2, 2), (1, 8, 8)]
LENGTHS = [5, 1, 7, 3]
GIVEN = [0, 1, 2, 0]
"""Frames of `CLIPS` that are given."""


@st.composite
def architectures(draw: st.DrawFn) -> dict[str, Any]:
    channels, text = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    return {
        "patch_size": draw(st.sampled_from([(1, 2, 2), (1, 1, 1), (1, 2, 1)])),
        "num_attention_heads": draw(st.integers(1, 3)),
        "attention_head_dim": draw(st.sampled_from([18, 24, 26])),
        "in_channels": channels + 1,
        "out_channels": channels,
        "num_layers": draw(st.integers(1, 3)),
        "mlp_ratio": draw(st.sampled_from([1.0, 2.5])),
        "concat_padding_mask": draw(st.booleans()),
        "use_crossattn_projection": draw(st.booleans()),
        "text_embed_dim": text,
        "crossattn_proj_in_channels": text + draw(st.integers(1, 9)),
        "encoder_hidden_states_channels": text,
        "rope_scale": draw(st.sampled_from([(1.0, 3.0, 3.0), (2.0, 1.0, 1.0)])),
        "extra_pos_embed_type": draw(st.sampled_from([None, "learnable"])),
    }


def cosmos(seed: int = 0, given_time: float | None = GIVEN_TIME, **keys: Any) -> CosmosTransformer:
    model = CosmosTransformer(CosmosConfig.from_dict({**TINY, **keys}), given_time=given_time).eval()
    model.load_state_dict(diffusers_model(seed, **keys).state_dict(), strict=True)
    return model


def requests(config: CosmosConfig, clips: list[tuple[int, ...]], lengths: list[int], seed: int = 1) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Whole clips of these sizes with unequal times and texts."""
    g = torch.Generator().manual_seed(seed)
    latents = [torch.randn(config.out_channels, *clip, generator=g) for clip in clips]
    return latents, torch.rand(len(clips), generator=g), [torch.randn(n, config.prompt_channels, generator=g) for n in lengths]


def parts(whole: list[Tensor], frames: list[int]) -> tuple[list[Tensor], list[Tensor]]:
    """Given and free frames."""
    return [x[:, :k] for x, k in zip(whole, frames, strict=True)], [x[:, k:] for x, k in zip(whole, frames, strict=True)]


# -- parity with diffusers ------------------------------------------------------------------------------------------


@given(architecture=architectures(), grid=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4)), seed=st.integers(0, 99))
@settings(max_examples=15)
@torch.no_grad()
def test_velocities_and_state_dicts_are_diffusers(architecture: dict[str, Any], grid: tuple[int, ...], seed: int) -> None:
    model = diffusers_model(seed, **architecture)
    config = CosmosConfig.from_dict(dict(model.config))
    ours = CosmosTransformer(config).eval()
    ours.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(ours.state_dict(), strict=True)

    size = tuple(n * p for n, p in zip(grid, config.patch_size, strict=True))
    latents, t, embeds = requests(config, [size] * 3, [4] * 3, seed)
    found = ours(torch.stack(latents), t, torch.stack(embeds))
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        torch.testing.assert_close(found[i], theirs(model, x, t[i], e), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("positions", [None, "learnable"])
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("given_time", [GIVEN_TIME, None])
@pytest.mark.parametrize("frames", [[0] * 4, GIVEN], ids=["text-to-video", "frames-given"])
def test_a_mixed_pack_is_diffusers_one_by_one(frames: list[int], given_time: float | None, buckets: int | None, positions: str | None) -> None:
    ours, model = cosmos(given_time=given_time, extra_pos_embed_type=positions), diffusers_model(extra_pos_embed_type=positions)
    ours.buckets = buckets
    clips = [(1, 8, 8), (3, 4, 12), (5, 2, 2), (1, 8, 8)]
    latents, t, embeds = requests(ours.config, clips, LENGTHS)
    fixed, free = parts(latents, frames)
    packed = ours(free, t, embeds, given=fixed)
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        alone = theirs(model, x, t[i], e, frames[i], given_time)
        assert alone.abs().max() > 1e-2
        torch.testing.assert_close(packed[i], alone[:, frames[i] :], **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
def test_clips_of_one_size_with_given_frames(buckets: int | None) -> None:
    """Equal token counts stand as rows, and each row has two times."""
    ours, model = cosmos(), diffusers_model()
    ours.buckets = buckets
    latents, t, embeds = requests(ours.config, [(3, 4, 4)] * 3, [4] * 3)
    for frames in ([1, 1, 1], [2, 1, 0]):
        fixed, free = parts(latents, frames)
        even = len(set(frames)) == 1
        packed = ours(torch.stack(free) if even else free, t, torch.stack(embeds), given=torch.stack(fixed) if even else fixed)
        assert isinstance(packed, Tensor) == even
        for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
            torch.testing.assert_close(packed[i], theirs(model, x, t[i], e, frames[i], GIVEN_TIME)[:, frames[i] :], **CLOSE)


@torch.no_grad()
def test_positions_follow_the_frames_a_second_where_they_are_said() -> None:
    ours, model = cosmos(), diffusers_model()
    latents, t, embeds = requests(ours.config, [(3, 4, 4)] * 2, [4] * 2)
    found = ours(torch.stack(latents), t, torch.stack(embeds), fps=torch.tensor([16, 30]))
    for i, (x, e) in enumerate(zip(latents, embeds, strict=True)):
        torch.testing.assert_close(found[i], theirs(model, x, t[i], e, fps=[16, 30][i]), **CLOSE)


def test_gradients_are_diffusers() -> None:
    ours, model = cosmos(), diffusers_model()
    latents, t, embeds = requests(ours.config, [(3, 4, 4)] * 3, [4] * 3)
    fixed, free = parts(latents, [1] * 3)
    ours(free, t, embeds, given=fixed)[0].square().sum().backward()
    with torch.enable_grad():
        theirs.__wrapped__(model, latents[0], t[0], embeds[0], 1, GIVEN_TIME)[:, 1:].square().sum().backward()  # type: ignore[attr-defined]
    expected = {n: p.grad for n, p in model.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)


# -- packing and precision ------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("buckets", [None, 8])
@pytest.mark.parametrize("poisoned", ["latents", "embeds", "t", "given"])
def test_a_nan_request_does_not_leak(poisoned: str, buckets: int | None) -> None:
    model = cosmos()
    model.buckets = buckets
    latents, t, embeds = requests(model.config, CLIPS, LENGTHS)
    fixed, free = parts(latents, GIVEN)
    clean = model(free, t, embeds, given=fixed)
    dirty = {"latents": [x.clone() for x in free], "t": t.clone(), "embeds": [e.clone() for e in embeds], "given": [g.clone() for g in fixed]}
    dirty[poisoned][1].fill_(torch.nan)
    found = model(dirty["latents"], dirty["t"], dirty["embeds"], given=dirty["given"])
    assert found[1].isnan().any()
    for i in (0, 2, 3):
        torch.testing.assert_close(found[i], clean[i], **CLOSE)


@torch.no_grad()
def test_bf16_weights_are_as_near_to_fp32_as_diffusers() -> None:
    ours, model = cosmos(), diffusers_model()
    latents, t, embeds = requests(ours.config, [(3, 4, 8)] * 3, [6] * 3)
    exact = ours(torch.stack(latents), t, torch.stack(embeds))
    model.to(torch.bfloat16)
    half = torch.stack(latents).bfloat16(), torch.stack(embeds).bfloat16()
    expected = torch.stack([theirs(model, x, t[i], e) for i, (x, e) in enumerate(zip(*half, strict=True))])
    found = ours.to(torch.bfloat16)(half[0], t, half[1])
    assert found.dtype == torch.bfloat16
    assert (found - exact).square().mean() < 2 * (expected - exact).square().mean()
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


@torch.no_grad()
def test_bf16_autocast_stays_near_fp32() -> None:
    model = cosmos()
    inputs = requests(model.config, CLIPS, LENGTHS)
    exact = model(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(*inputs)
    for a, b in zip(exact, rough, strict=True):
        assert 0 < (a - b).abs().max() < 0.05 * a.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("clips", [[(3, 8, 8)] * 4, [(3, 8, 8), (3, 8, 8), (1, 4, 4), (2, 8, 4)]], ids=["even", "mixed"])
def test_the_memory_planner_gets_an_upper_bound_that_is_not_far_off(clips: list[tuple[int, ...]], dtype: torch.dtype) -> None:
    model = cosmos(num_attention_heads=4, attention_head_dim=32, mlp_ratio=5.5)
    inputs = requests(model.config, clips * 4, [3] * len(clips) * 4)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32), PeakBytes() as peak:
        model(*inputs)
    weights = sum(p.numel() for p in model.parameters()) * 2 if dtype != torch.float32 else 0  # what autocast keeps of them
    found = (peak.peak - weights) / sum(model.tokens(x.shape) for x in inputs[0])
    bound = model.activation_bytes(dtype.itemsize)
    assert bound / 3 < found < bound


# -- counts, refusals and configuration -----------------------------------------------------------------------------


def test_token_counts() -> None:
    model = cosmos()
    assert model.tokens((4, 3, 8, 12)) == model.packed_tokens((4, 3, 8, 12), 512) == 3 * 4 * 6
    with pytest.raises(ValueError, match=r"shape \(5, 3, 8, 8\) does not fit: this model takes \(4 channels, frames, height, width\)"):
        model.tokens((5, 3, 8, 8))
    with pytest.raises(ValueError, match="13x1x1 patches exceed max_size=12"):
        model.tokens((4, 13, 2, 2))


def test_learnt_positions_end_with_their_tables() -> None:
    """Of 8 frames, where the tables of rows and columns hold 12."""
    model = cosmos(extra_pos_embed_type="learnable")
    with pytest.raises(ValueError, match=r"\(9, 1, 1\) patches are more than the network has learnt positions of, \(8, 12, 12\)"):
        model(*requests(model.config, [(9, 2, 2)], [3]))


@given(architecture=architectures())
@settings(max_examples=25)
def test_config_round_trip(architecture: dict[str, Any]) -> None:
    config = CosmosConfig.from_dict({"_class_name": "CosmosTransformer3DModel", "_diffusers_version": "0.42.1", **TINY, **architecture})
    assert CosmosConfig.from_dict(config.to_dict()) == config


def test_config_defaults_are_diffusers() -> None:
    theirs = {k: p.default for k, p in inspect.signature(CosmosTransformer3DModel.__init__).parameters.items() if k != "self"}
    assert CosmosConfig(**theirs) == CosmosConfig()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 1}, "keys this model does not know: window"),
        ({"extra_pos_embed_type": "sincos"}, "extra_pos_embed_type='sincos' is not known"),
        ({"img_context_dim_in": 12}, "are of Cosmos-Transfer2.5"),
        ({"controlnet_block_every_n": 7}, "are of Cosmos-Transfer2.5"),
        ({"in_channels": 4}, "in_channels=4 must be out_channels [+] 1 = 5"),
        ({"patch_size": [2, 2, 2]}, "times are a frame's"),
        ({"encoder_hidden_states_channels": 11}, "must be text_embed_dim=10"),
    ],
)
def test_config_refusals(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CosmosConfig.from_dict({**TINY, **change})


@torch.no_grad()
def test_fresh_weights_predict_zero_and_follow_their_seed() -> None:
    def fresh(seed: int) -> CosmosTransformer:
        model = CosmosTransformer(CosmosConfig.from_dict(TINY))
        model.init_weights(torch.Generator().manual_seed(seed))
        return model

    a, b, c = (fresh(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert not all(torch.equal(a[k], c[k]) for k in a)
    model = fresh(0)
    assert not any(x.any() for x in model(*requests(model.config, CLIPS, LENGTHS)))


@torch.no_grad()
def test_a_prompt_that_was_projected_before_is_worth_the_same() -> None:
    ours = cosmos()
    latents, t, embeds = requests(ours.config, [(3, 4, 4)], [4])
    expected = ours(latents, t, embeds)
    torch.testing.assert_close(ours(latents, t, [ours.project(embeds[0])])[0], expected[0], **CLOSE)
    with pytest.raises(ValueError, match="text features of 11 channels fit neither text_embed_dim=10 nor 14"):
        ours(latents, t, [torch.zeros(4, 11)])
