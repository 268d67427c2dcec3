"""Layers that several networks share; parameter names are diffusers'."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def time_features(t: Tensor, channels: int = 256, scale: float = 1000.0) -> Tensor:
    """Sinusoidal features of `scale` t, `[B]` to fp32 `[B, channels]`: cosines first, frequencies 10000^(-i / (channels / 2))."""
    half = channels // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    angle = scale * t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], 1)


class TwoLayer(nn.Module):
    """linear_1, an activation, linear_2: diffusers' TimestepEmbedding (SiLU) and PixArtAlphaTextProjection (SiLU or tanh-GELU)."""

    def __init__(self, in_dim: int, dim: int, gelu: bool = False) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)
        self.gelu = gelu

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear_1(x)
        out: Tensor = self.linear_2(F.gelu(x, approximate="tanh") if self.gelu else F.silu(x))
        return out


def norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Layer norm without parameters."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


class FeedForward(nn.Module):
    """GELU MLP; parameter names net.0.proj and net.2.

    Args:
        dim, inner, out: channels; out = dim unless given.
        approximate: GELU by tanh, as most networks here, or `none`: exact.
        bias: of both layers.
    """

    class _Proj(nn.Module):
        def __init__(self, dim: int, inner: int, approximate: str, bias: bool) -> None:
            super().__init__()
            self.approximate = approximate
            self.proj = nn.Linear(dim, inner, bias)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.proj(x), approximate=self.approximate)

    def __init__(self, dim: int, inner: int, out: int | None = None, approximate: str = "tanh", bias: bool = True) -> None:
        super().__init__()
        self.net = nn.Sequential(self._Proj(dim, inner, approximate, bias), nn.Identity(), nn.Linear(inner, out or dim, bias))

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found
