"""Wan 2.1 text-to-video transformer on packed sequences (arXiv 2503.20314), with diffusers' config keys and parameter names.

A state dict of `diffusers.WanTransformer3DModel` loads here unchanged and back. Clips of any mix of frame counts and
sizes share one forward: video tokens form one stream (`diffusion.packing`), rotary positions follow each clip's own
grid, modulation is per request, and each clip attends to itself and to its own text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention import constants, varlen_attention
from diffusion.families.base import Block, PackedModel, Saved, by_shape, feed_forward_bytes, known_keys
from diffusion.families.layers import FeedForward, TwoLayer, norm, time_features
from diffusion.families.wan import cost
from diffusion.packing import Layout, Stream, spread


@dataclass(frozen=True)
class WanConfig:
    """The keys of a diffusers `WanTransformer3DModel` config.json; same defaults."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    num_attention_heads: int = 40
    attention_head_dim: int = 128
    in_channels: int = 16
    out_channels: int | None = 16
    text_dim: int = 4096
    freq_dim: int = 256
    ffn_dim: int = 13824
    num_layers: int = 40
    cross_attn_norm: bool = True
    qk_norm: str | None = "rms_norm_across_heads"
    eps: float = 1e-6
    image_dim: int | None = None
    added_kv_proj_dim: int | None = None
    rope_max_seq_len: int = 1024
    pos_embed_seq_len: int | None = None

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> WanConfig:
        """From a config.json. Raises ValueError on a key or value this implementation does not know."""
        config = cls(**known_keys(cls, values, "Wan"))
        for key in ("image_dim", "added_kv_proj_dim", "pos_embed_seq_len"):
            if getattr(config, key) is not None:
                raise ValueError(f"{key}={getattr(config, key)} belongs to image-to-video; this model is text-to-video only")
        if config.qk_norm != "rms_norm_across_heads":
            raise ValueError(f"qk_norm={config.qk_norm!r} is not known; Wan 2.1 uses 'rms_norm_across_heads'")
        if len(config.patch_size) != 3:
            raise ValueError(f"patch_size={config.patch_size} must have three edges: frames, height, width")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Rotary:
    """Rotary positions of a patch grid: channel pairs are shared out to the frame, row and column axis.

    A third of the pairs (rounded down) goes to rows and to columns each, the rest to frames; frequencies theta^(-2i/dim)
    with theta 10000, computed in fp64.
    """

    def __init__(self, head_dim: int, length: int) -> None:
        side = 2 * (head_dim // 6)
        self.dims = (head_dim - 2 * side, side, side)
        self.length = length
        self._tables: dict[torch.device, list[Tensor]] = {}

    def _angles(self, device: torch.device) -> list[Tensor]:
        """Angle of each position along each axis, `[length, dim / 2]` fp64."""
        if device not in self._tables:
            with constants():
                position = torch.arange(self.length, dtype=torch.float64)
                angles = [position[:, None] / 10000.0 ** (torch.arange(0, d, 2, dtype=torch.float64) / d) for d in self.dims]
                self._tables[device] = [a.to(device) for a in angles]
        return self._tables[device]

    def __call__(self, grid: tuple[int, ...], device: torch.device) -> Tensor:
        """`[tokens, 2, head_dim / 2]`: cosine and sine of each token of a grid, no axis of which is longer than `length`."""
        frames, rows, columns = grid
        f, r, c = (table[:n] for table, n in zip(self._angles(device), grid, strict=True))
        parts = f[:, None, None].expand(-1, rows, columns, -1), r[None, :, None].expand(frames, -1, columns, -1), c[None, None].expand(frames, rows, -1, -1)
        angle = torch.cat(parts, -1).flatten(0, 2)
        return torch.stack([angle.cos(), angle.sin()], 1).float()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Turn neighbouring channel pairs of `x` `[rows, tokens, heads, d]` by `positions` `[1, tokens, 2, d / 2]`."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = (p[:, :, None] for p in positions.unbind(2))
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    """Projections of one attention; queries and keys are normed across all heads."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        self.norm_q, self.norm_k = (nn.RMSNorm(dim, eps=config.eps) for _ in range(2))

    def _heads(self, x: Tensor, rms: nn.Module | None) -> Tensor:
        x = x if rms is None else rms(x).to(x.dtype)  # autocast on a GPU computes the norm in fp32
        return x.unflatten(-1, (self.heads, -1))

    def queries(self, x: Tensor) -> Tensor:
        """`[rows, tokens, dim]` to `[rows, tokens, heads, head_dim]`."""
        return self._heads(self.to_q(x), self.norm_q)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._heads(self.to_k(x), self.norm_k), self._heads(self.to_v(x), None)


class LayerNorm32(nn.LayerNorm):
    """Layer norm computed in fp32 whatever the type of its input and weights, which the output keeps."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None if a is None else a.float() for a in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class WanBlock(Block):
    """Self-attention, cross-attention to the text, feed-forward; the first and the last are modulated."""

    regions = ("before", "between", "after")

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.eps = config.eps
        self.attn1, self.attn2 = Attention(config), Attention(config)
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
        return rotate(self.attn1.queries(normed), positions), rotate(k, positions), v

    def between(self, x: Tensor, attended: Tensor, text: Tensor, vectors: Tensor, owner: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The stream behind the self-attention; queries, keys and values of the cross-attention."""
        x = (x.float() + self.attn1.to_out[0](attended) * self._vector(vectors, 2, owner)).to(x.dtype)
        return x, self.attn2.queries(self.norm2(x)), *self.attn2.keys_values(text)

    def after(self, x: Tensor, attended: Tensor, vectors: Tensor, owner: Tensor | None) -> Tensor:
        """The stream behind the cross-attention and the feed-forward."""
        x = x + self.attn2.to_out[0](attended)
        return (x.float() + self.ffn(self._normed(x, vectors, 3, owner)).float() * self._vector(vectors, 5, owner)).to(x.dtype)

    def _self_attention(self, x: Tensor, vectors: Tensor, positions: Tensor, layout: Layout, provider: str) -> Tensor:
        q, k, v = (layout.image.flat(a) for a in self.before(x, vectors, positions, layout.image.owner(x.device)))
        return layout.image.unflat(varlen_attention(q, k, v, layout.own, provider).flatten(-2))

    def _cross_attention(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, provider: str) -> Tensor:
        q, k, v = layout.image.flat(q), layout.text.flat(k), layout.text.flat(v)
        return layout.image.unflat(varlen_attention(q, k, v, layout.cross, provider).flatten(-2))

    def forward(self, x: Tensor, text: Tensor, vectors: Tensor, positions: Tensor, layout: Layout, provider: str) -> Tensor:
        """Video stream to video stream.

        Args:
            x: video stream.
            text: text stream, `dim` wide.
            vectors: modulation of each request `[R, 6, dim]`.
            positions: `[1, tokens, 2, head_dim / 2]`.
        """
        owner = layout.image.owner(x.device)
        attended = self._self_attention(x, vectors, positions, layout, provider)
        x, q, k, v = self.between(x, attended, text, vectors, owner)
        attended = self._cross_attention(q, k, v, layout, provider)
        del q, k, v  # the feed-forward is where memory peaks
        return self.after(x, attended, vectors, owner)


class ConditionEmbedder(nn.Module):
    """Time and text for the blocks: a vector of each request, its six modulation vectors, and the text stream."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.channels = config.freq_dim
        self.time_embedder = TwoLayer(config.freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayer(config.text_dim, dim, gelu=True)

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` `[B]` to `[B, dim]` and `[B, 6, dim]`."""
        temb = self.time_embedder(time_features(t, self.channels).to(self.time_embedder.linear_1.weight.dtype))
        return temb, self.time_proj(F.silu(temb)).unflatten(1, (6, -1))


class WanTransformer(PackedModel):
    """Velocity network of Wan 2.1 text-to-video.

    Args:
        config: architecture.
        provider: attention provider.
    """

    block_list = "blocks"

    def __init__(self, config: WanConfig, provider: str = "sdpa") -> None:
        super().__init__()
        self._config, self.provider = config, provider
        self.patch = config.patch_size
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        dim = config.inner_dim
        self.rotary = Rotary(config.attention_head_dim, config.rope_max_seq_len)
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(config)
        self.add_module("blocks", nn.ModuleList(WanBlock(config) for _ in range(config.num_layers)))
        self.proj_out = nn.Linear(dim, self.out_channels * config.patch_size[0] * config.patch_size[1] * config.patch_size[2])
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, dim))
        for name, table in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(table, std=dim**-0.5)

    @property
    def config(self) -> WanConfig:
        return self._config

    def init_weights(self, generator: torch.Generator) -> None:
        """Xavier-uniform linears and patches, normal modulation tables, zero output layer."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv3d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, table in self.named_parameters():
            if name.endswith("scale_shift_table"):
                nn.init.normal_(table, std=self.config.inner_dim**-0.5, generator=generator)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def longest_edge(self) -> tuple[int, str]:
        return self.config.rope_max_seq_len, "rope_max_seq_len"

    def packed_tokens(self, shape: Sequence[int], prompt_tokens: int) -> int:
        """Video tokens: text goes through two projections a layer only."""
        return self.tokens(shape)

    def activation_bytes(self, itemsize: int) -> int:
        """See `PackedModel.activation_bytes`; the peak is the feed-forward of a block."""
        return feed_forward_bytes(self.config.inner_dim, self.config.ffn_dim, itemsize)

    def _embed(self, latents: Tensor) -> Tensor:
        """`[B, C, f, h, w]` to `[B, tokens, dim]`."""
        tokens: Tensor = self.patch_embedding(latents).flatten(2).transpose(1, 2)
        return tokens

    def _positions(self, latents: Tensor | list[Tensor], stream: Stream) -> Tensor:
        """Rotary positions of a stream `[1, tokens, 2, head_dim / 2]`; each grid's are computed once."""
        grids = [self.grid(x.shape) for x in latents]
        tables = {grid: self.rotary(grid, latents[0].device) for grid in set(grids)}
        if stream.even and len(tables) == 1:
            return tables[grids[0]][None]
        each = [tables[grid].flatten(1) for grid in grids]
        return stream.pack(each).unflatten(-1, (2, -1))

    def forward_flops(self, shape: Sequence[int], prompt_tokens: int) -> int:
        return cost.forward_flops(self.config, shape, prompt_tokens)

    def saved(self, shape: Sequence[int], prompt_tokens: int, itemsize: int, adapted: bool) -> Saved:
        return cost.saved(self.config, shape, prompt_tokens, itemsize, adapted)

    def forward(self, latents: Tensor | list[Tensor], t: Tensor, prompt_embeds: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
        """Velocities of a batch of clips (see `PackedModel.forward`); latents are `[C, f, h, w]` each."""
        layout = self._layout(latents, prompt_embeds)
        x = layout.image.pack(self._embed(latents) if isinstance(latents, Tensor) else by_shape(latents, self._embed)).contiguous()
        positions = self._positions(latents, layout.image)
        text = self.condition_embedder.text_embedder(layout.text.pack(prompt_embeds))
        temb, vectors = self.condition_embedder(t)
        temb, vectors = self._per_request(temb), self._per_request(vectors.flatten(1)).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, text, vectors, positions, layout, self.provider)
        shift, scale = (self.scale_shift_table.float() + temb.float()[:, None]).unbind(1)
        owner = layout.image.owner(x.device)
        out = (norm(x.float(), self.config.eps) * (1 + spread(scale, owner)) + spread(shift, owner)).to(x.dtype)
        return self._unpack(self.proj_out(out), latents, layout.image)
