"""Variable-length attention over packed sequences: many segments laid end to end, each seeing only itself.

`varlen_attention(q, k, v, lens)` takes `[1, T, heads, head_dim]` and the segment lengths (sum T). Three providers:

- `xformers`: `memory_efficient_attention` with a `BlockDiagonalMask` (GPU only: xformers has no CPU kernels);
- `torch_varlen`: `torch.nn.attention.varlen` (GPU only);
- `sdpa`: one scaled-dot-product call when all segments are equally long, else one call a segment. Runs everywhere and
  is the oracle of the tests.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PROVIDERS = ("sdpa", "xformers", "torch_varlen")


def _sdpa(q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
    if len(set(lens)) == 1:
        n, length = len(lens), lens[0]
        rows, keys, values = (a.reshape(n, length, *a.shape[2:]).transpose(1, 2) for a in (q, k, v))
        return F.scaled_dot_product_attention(rows, keys, values).transpose(1, 2).reshape(q.shape)
    out = [
        F.scaled_dot_product_attention(a.transpose(1, 2), b.transpose(1, 2), c.transpose(1, 2))
        for a, b, c in zip(q.split(lens, 1), k.split(lens, 1), v.split(lens, 1), strict=True)
    ]
    return torch.cat([o.transpose(1, 2) for o in out], 1)


def _xformers(q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
    from xformers.ops import fmha, memory_efficient_attention

    mask = fmha.attn_bias.BlockDiagonalMask.from_seqlens(lens)
    out: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask)
    return out


def _torch_varlen(q: Tensor, k: Tensor, v: Tensor, lens: list[int]) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.tensor([0, *lens], device=q.device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    longest = max(lens)
    out = varlen_attn(q[0], k[0], v[0], ends, ends, longest, longest)
    assert isinstance(out, Tensor)  # a tuple only when statistics are asked for
    return out[None]


def resolve_provider(name: str, device: torch.device) -> str:
    """Provider to use: `auto` picks xformers on a GPU where it imports, else sdpa.

    Raises:
        ValueError: unknown provider, or one without kernels for this device.
    """
    if name == "auto":
        if device.type != "cuda":
            return "sdpa"
        try:
            import xformers.ops  # noqa: F401
        except ImportError:
            return "sdpa"
        return "xformers"
    if name not in PROVIDERS:
        raise ValueError(f"unknown attention provider {name!r}; known: auto, {', '.join(PROVIDERS)}")
    if name != "sdpa" and device.type != "cuda":
        raise ValueError(f"attention provider {name!r} has no kernels for {device.type}; use model.attention=auto or sdpa")
    return name


def varlen_attention(q: Tensor, k: Tensor, v: Tensor, lens: list[int], provider: str = "sdpa") -> Tensor:
    """Attention of packed segments.

    Args:
        q, k, v: `[1, T, heads, head_dim]`.
        lens: segment lengths, sum T.
        provider: one of `PROVIDERS` (see `resolve_provider`).
    Returns:
        `[1, T, heads, head_dim]`.
    """
    if provider == "sdpa":
        return _sdpa(q, k, v, lens)
    if provider == "xformers":
        return _xformers(q, k, v, lens)
    return _torch_varlen(q, k, v, lens)
