"""The transformer block of Cosmos-Predict2.5 on packed streams, with diffusers' parameter names.

All three sublayers are modulated and gated. Vectors come from the time in two ways: a pair of small linear layers of each sublayer,
and a sum that all share. They are made per request, or per part of one, and only then spread over its tokens: diffusers makes them
for every token, which costs a tenth more operations at 93 frames of 704 x 1280.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention import varlen_attention
from diffusion.families.base import Block
from diffusion.families.cosmos.config import EPS, QK_EPS, CosmosConfig
from diffusion.families.layers import FeedForward, norm
from diffusion.families.rotary import rotate_halves
from diffusion.packing import Layout, spread


class Modulation(nn.Module):
    """Vectors of a sublayer from the time: a low-rank pair of linear layers, and what all sublayers share."""

    def __init__(self, config: CosmosConfig, vectors: int) -> None:
        super().__init__()
        dim = config.inner_dim
        self.vectors = vectors
        self.linear_1 = nn.Linear(dim, config.adaln_lora_dim, bias=False)
        self.linear_2 = nn.Linear(config.adaln_lora_dim, vectors * dim, bias=False)

    def forward(self, embedded: Tensor, shared: Tensor) -> tuple[Tensor, ...]:
        """`[R, dim]` and `[R, 3 dim]` to `vectors` times `[R, dim]`: shift, scale, gate."""
        out: Tensor = self.linear_2(self.linear_1(F.silu(embedded)))
        return (out + shared[:, : out.shape[1]]).chunk(self.vectors, 1)


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed in each head."""

    def __init__(self, config: CosmosConfig, key_dim: int) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = nn.Linear(dim, dim, bias=False), nn.Linear(key_dim, dim, bias=False), nn.Linear(key_dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q, self.norm_k = (nn.RMSNorm(config.attention_head_dim, eps=QK_EPS) for _ in range(2))

    def queries(self, x: Tensor) -> Tensor:
        """`[rows, tokens, dim]` to `[rows, tokens, heads, head_dim]`."""
        q = self.to_q(x).unflatten(-1, (self.heads, -1))
        out: Tensor = self.norm_q(q).to(q.dtype)
        return out

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_k, self.to_v))
        return self.norm_k(k).to(k.dtype), v


class CosmosBlock(Block):
    """Self-attention, cross-attention to the text, feed-forward."""

    regions = ("before", "between", "after")

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (Modulation(config, 3) for _ in range(3))
        self.attn1, self.attn2 = Attention(config, config.inner_dim), Attention(config, config.text_embed_dim)
        self.ff = FeedForward(config.inner_dim, config.ffn_dim, approximate="none", bias=False)

    def before(self, x: Tensor, shift: Tensor, scale: Tensor, positions: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of the self-attention."""
        normed = modulated(x, shift, scale, owner)
        k, v = self.attn1.keys_values(normed)
        return rotate_halves(self.attn1.queries(normed), positions), rotate_halves(k, positions), v

    def between(
        self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, text: Tensor, owner: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream behind the self-attention; queries, keys and values of the cross-attention."""
        x = x + spread(gate, owner) * self.attn1.to_out[0](attended)
        return x, self.attn2.queries(modulated(x, shift, scale, owner)), *self.attn2.keys_values(text)

    def after(self, x: Tensor, attended: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, gate_ff: Tensor, owner: Tensor | None) -> Tensor:
        """The stream behind the cross-attention and the feed-forward."""
        x = x + spread(gate, owner) * self.attn2.to_out[0](attended)
        return x + spread(gate_ff, owner) * self.ff(modulated(x, shift, scale, owner))

    def forward(
        self,
        x: Tensor,
        text: Tensor,
        embedded: Tensor,
        shared: Tensor,
        positions: Tensor,
        owner: Tensor | None,
        layout: Layout,
        provider: str,
    ) -> Tensor:
        """Video stream to video stream.

        Args:
            x: video stream.
            text: text stream, `text_embed_dim` wide.
            embedded, shared: of the time of each request, or of each part of one, `[R, dim]` and `[R, 3 dim]`.
            positions: `[1, tokens, 2, head_dim / 2]`.
            owner: row of them of each token (`diffusion.packing.spread`).
        """
        (shift, scale, gate), second, third = (layer(embedded, shared) for layer in (self.norm1, self.norm2, self.norm3))
        q, k, v = (layout.image.flat(a) for a in self.before(x, shift, scale, positions, owner))
        attended = layout.image.unflat(varlen_attention(q, k, v, layout.own, provider).flatten(-2))
        x, q, k, v = self.between(x, attended, gate, second[0], second[1], text, owner)
        q, k, v = layout.image.flat(q), layout.text.flat(k), layout.text.flat(v)
        attended = layout.image.unflat(varlen_attention(q, k, v, layout.cross, provider).flatten(-2))
        del q, k, v  # the feed-forward is where memory peaks
        return self.after(x, attended, second[2], third[0], third[1], third[2], owner)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor | None) -> Tensor:
    """Layer norm of tokens, shifted and scaled by their vectors `[R, dim]`."""
    return norm(x, EPS) * (1 + spread(scale, owner)) + spread(shift, owner)
