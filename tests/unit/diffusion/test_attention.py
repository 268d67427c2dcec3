"""The loop of SDPA over segments against dense attention with a block-diagonal mask, ours and xformers'."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion.attention import PROVIDERS, resolve_provider, varlen_attention

LENS = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def qkv(total: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, total, 2, 8, generator=torch.Generator().manual_seed(seed))
    return q, k, v


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), attn_mask=mask).transpose(1, 2)


@given(lens=LENS, seed=st.integers(0, 999))
@settings(max_examples=60)
def test_segments_see_only_themselves(lens: list[int], seed: int) -> None:
    q, k, v = qkv(sum(lens), seed)
    owner = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    expected = dense(q, k, v, owner[:, None] == owner)
    torch.testing.assert_close(varlen_attention(q, k, v, lens, "sdpa"), expected, atol=1e-6, rtol=1e-5)


@given(lens=LENS, seed=st.integers(0, 999))
@settings(max_examples=30)
def test_segments_are_those_of_xformers_mask(lens: list[int], seed: int) -> None:
    from xformers.ops import fmha

    q, k, v = qkv(sum(lens), seed)
    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lens).materialize((sum(lens), sum(lens)))
    torch.testing.assert_close(varlen_attention(q, k, v, lens, "sdpa"), dense(q, k, v, mask), atol=1e-6, rtol=1e-5)


def test_equal_segments_take_one_call_and_give_the_same() -> None:
    q, k, v = qkv(12, 0)
    together = varlen_attention(q, k, v, [4, 4, 4])
    apart = torch.cat([varlen_attention(q[:, s], k[:, s], v[:, s], [4]) for s in (slice(0, 4), slice(4, 8), slice(8, 12))], 1)
    assert together.shape == q.shape
    torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-5)


def test_provider_on_a_cpu() -> None:
    cpu = torch.device("cpu")
    assert resolve_provider("auto", cpu) == "sdpa"
    assert resolve_provider("sdpa", cpu) == "sdpa"
    for name in set(PROVIDERS) - {"sdpa"}:
        with pytest.raises(ValueError, match=f"'{name}' has no kernels for cpu; use model.attention=auto or sdpa"):
            resolve_provider(name, cpu)


def test_provider_on_a_gpu() -> None:
    gpu = torch.device("cuda")
    assert resolve_provider("auto", gpu) == "xformers"  # importable here, see the oracle above
    for name in PROVIDERS:
        assert resolve_provider(name, gpu) == name


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_an_unknown_provider_is_refused_with_the_known_ones(device: str) -> None:
    with pytest.raises(ValueError, match="unknown attention provider 'flash3'; known: auto, sdpa, xformers, torch_varlen"):
        resolve_provider("flash3", torch.device(device))
