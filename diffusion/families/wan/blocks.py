"""The transformer block of Wan on packed streams, with diffusers' parameter names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention import varlen_attention
from diffusion.families.base import Block
from diffusion.families.layers import FeedForward, norm
from diffusion.families.rotary import rotate_pairs
from diffusion.families.wan.config import WanConfig
from diffusion.packing import Layout, spread


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed across all heads. With `image` also keys and values of an image's features."""

    def __init__(self, config: WanConfig, image: bool = False) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=config.eps) for _ in range(2))
        if image:
            self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(2))
            self.norm_added_k = nn.RMSNorm(dim, eps=config.eps)

    def _heads(self, x: Tensor, rms: nn.Module | None) -> Tensor:
        x = x if rms is None else rms(x).to(x.dtype)  # autocast on a GPU computes the norm in fp32
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        """`[rows, tokens, dim]` to `[rows, tokens, heads, head_dim]`."""
        return self._heads(self.to_q(x), self.norm_q)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.to_k(x), self.norm_k), self._heads(self.to_v(x), None)

    def added_keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of an image's features."""
        return self._heads(self.add_k_proj(x), self.norm_added_k), self._heads(self.add_v_proj(x), None)


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the type of its input and weights, which the output keeps."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if a is None else a.float() for a in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


@dataclass(frozen=True)
class Features:
    """An image's features for the cross-attention: their stream, `dim` wide, and its layout beside the video's."""

    tokens: Tensor
    layout: Layout


class WanBlock(Block):
    """Self-attention, cross-attention to the text and to an image's features, feed-forward; the first and the last are modulated."""

    regions = ("before", "between", "after", "features")

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.eps = config.eps
        self.attn1, self.attn2 = Attention(config), Attention(config, config.image_dim is not None)
        self.norm2 = LayerNorm32(dim, eps=config.eps) if config.cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, config.ffn_dim)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, dim))

    def _vector(self, vectors: Tensor, index: int, owner: Tensor | None) -> Tensor:
        return spread(self.scale_shift_table[:, index].float() + vectors[:, index].float(), owner)

    def _normed(self, x: Tensor, vectors: Tensor, first: int, owner: Tensor | None) -> Tensor:
        shift, scale = (self._vector(vectors, i, owner) for i in (first, first + 1))
        return (norm(x.float(), self.eps) * (1 + scale) + shift).to(x.dtype)

    def before(self, x: Tensor, vectors: Tensor, positions: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the self-attention."""
        normed = self._normed(x, vectors, 0, owner)
        k, v = self.attn1.keys_values(normed)
        return rotate_pairs(self.attn1.queries(normed), positions), rotate_pairs(k, positions), v

    def between(self, x: Tensor, attended: Tensor, text: Tensor, vectors: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream behind the self-attention; queries, keys and values of the cross-attention."""
        x = (x.float() + self.attn1.to_out[0](attended) * self._vector(vectors, 2, owner)).to(x.dtype)
        return x, self.attn2.queries(self.norm2(x)), *self.attn2.keys_values(text)

    def features(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of an image's features."""
        return self.attn2.added_keys_values(image)

    def after(self, x: Tensor, attended: Tensor, vectors: Tensor, owner: Tensor | None) -> Tensor:
        """The stream behind the cross-attention and the feed-forward."""
        x = x + self.attn2.to_out[0](attended)
        return (x.float() + self.ffn(self._normed(x, vectors, 3, owner)).float() * self._vector(vectors, 5, owner)).to(x.dtype)

    def _self_attention(self, x: Tensor, vectors: Tensor, positions: Tensor, owner: Tensor | None, layout: Layout, provider: str) -> Tensor:
        q, k, v = (layout.image.flat(a) for a in self.before(x, vectors, positions, owner))
        return layout.image.unflat(varlen_attention(q, k, v, layout.own, provider).flatten(-2))

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, provider: str) -> Tensor:
        q, k, v = layout.image.flat(q), layout.text.flat(k), layout.text.flat(v)
        return layout.image.unflat(varlen_attention(q, k, v, layout.cross, provider).flatten(-2))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        vectors: Tensor,
        positions: Tensor,
        owner: Tensor | None,
        layout: Layout,
        provider: str,
        features: Features | None = None,
    ) -> Tensor:
        """Video stream to video stream.

        Args:
            x: video stream.
            text: text stream, `dim` wide.
            vectors: modulation of each request, or of each part of one, `[R, 6, dim]`.
            positions: `[1, tokens, 2, head_dim / 2]`.
            owner: row of `vectors` of each token (`diffusion.packing.spread`).
        """
        attended = self._self_attention(x, vectors, positions, owner, layout, provider)
        x, q, k, v = self.between(x, attended, text, vectors, owner)
        attended = self._cross_attention(q, k, v, layout, provider)
        if features is not None:
            attended = attended + self._cross_attention(q, *self.features(features.tokens), features.layout, provider)
        del q, k, v  # the feed-forward is where memory peaks
        return self.after(x, attended, vectors, owner)
