"""SD3 / SD3.5 MMDiT on packed sequences (arXiv 2403.03206), with diffusers' config keys and parameter names.

A state dict of `diffusers.SD3Transformer2DModel` loads here unchanged and back. Requests of any mix of sizes, prompt
lengths and times share one forward: image tokens and text tokens are two streams (`diffusion.packing`), joint attention
runs over `[image_i, text_i]` segments, modulation is per request.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention import varlen_attention
from diffusion.families.base import Block, PackedModel, Saved, by_shape, feed_forward_bytes, known_keys
from diffusion.families.layers import FeedForward, TwoLayer, norm, time_features
from diffusion.families.sd3 import cost
from diffusion.packing import Layout, spread


@dataclass(frozen=True)
class SD3Config:
    """The keys of a diffusers `SD3Transformer2DModel` config.json; same defaults."""

    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096
    caption_projection_dim: int = 1152
    pooled_projection_dim: int = 2048
    out_channels: int | None = 16
    pos_embed_max_size: int = 96
    dual_attention_layers: tuple[int, ...] = field(default_factory=tuple)
    qk_norm: str | None = None

    @property
    def inner_dim(self) -> int:
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SD3Config:
        """From a config.json. Raises ValueError on a key or value this implementation does not know."""
        config = cls(**known_keys(cls, values, "SD3"))
        if config.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={config.qk_norm!r} is not known; SD3 uses none, SD3.5 'rms_norm'")
        if config.caption_projection_dim != config.inner_dim:
            raise ValueError(f"caption_projection_dim={config.caption_projection_dim} must equal heads x head_dim = {config.inner_dim}")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def sincos_table(dim: int, grid: int, base: int) -> Tensor:
    """2-D sine-cosine position table `[1, grid², dim]`: first half of the channels from the column, second from the row.

    Positions are index / (grid / base); frequencies 10000^(-2i/dim'), computed in fp64 (MAE, arXiv 2111.06377).
    """
    position = torch.arange(grid, dtype=torch.float64) / (grid / base)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angle = position[:, None] * omega
    one = torch.cat([angle.sin(), angle.cos()], 1)
    columns = one[None].expand(grid, grid, -1)
    rows = one[:, None].expand(grid, grid, -1)
    return torch.cat([columns, rows], 2).reshape(1, grid * grid, dim).float()


class PatchEmbed(nn.Module):
    """Patches to tokens plus the centre crop of a square position table (a persistent buffer, as in diffusers)."""

    pos_embed: Tensor

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.patch, self.grid = config.patch_size, config.pos_embed_max_size
        self.proj = nn.Conv2d(config.in_channels, config.inner_dim, self.patch, self.patch)
        table = sincos_table(config.inner_dim, self.grid, config.sample_size // self.patch)
        self.register_buffer("pos_embed", table, persistent=True)

    def crop(self, rows: int, columns: int) -> Tensor:
        top, left = (self.grid - rows) // 2, (self.grid - columns) // 2
        table = self.pos_embed.reshape(self.grid, self.grid, -1)[top : top + rows, left : left + columns]
        return table.reshape(rows * columns, -1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, H W / patch², dim]`."""
        tokens = self.proj(latents)
        rows, columns = tokens.shape[-2:]
        return tokens.flatten(2).transpose(1, 2) + self.crop(rows, columns)


class TimeTextEmbed(nn.Module):
    """Conditioning vector: sinusoidal time (256 channels) and the pooled text, each through two layers."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayer(256, config.inner_dim)
        self.text_embedder = TwoLayer(config.pooled_projection_dim, config.inner_dim)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """`t` `[B]` in [0, 1], `pooled` `[B, P]` to `[B, dim]`."""
        out: Tensor = self.timestep_embedder(time_features(t).to(pooled.dtype)) + self.text_embedder(pooled)
        return out


class Modulation(nn.Module):
    """SiLU then one linear to `count` vectors that shift, scale and gate tokens (adaLN)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)

    def forward(self, temb: Tensor) -> Tensor:
        """Conditioning `[R, dim]` to `[R, count * dim]`."""
        out: Tensor = self.linear(F.silu(temb))
        return out

    def parts(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Its output as `count` vectors `[R, dim]`."""
        return vectors.chunk(self.count, 1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor, owner: Tensor | None) -> Tensor:
    """Shift and scale tokens by the vectors of their requests (`[R, dim]` each; `owner` as in `spread`)."""
    return x * (1 + spread(scale, owner)) + spread(shift, owner)


class Attention(nn.Module):
    """Projections of one attention; `joint` adds the text stream's own, `text_out` its output projection."""

    def __init__(self, config: SD3Config, joint: bool, text_out: bool) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads = config.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])
        qk_norm = config.qk_norm is not None
        self.norm_q = nn.RMSNorm(config.attention_head_dim, eps=1e-6) if qk_norm else None
        self.norm_k = nn.RMSNorm(config.attention_head_dim, eps=1e-6) if qk_norm else None
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(dim, dim) for _ in range(3))
            self.norm_added_q = nn.RMSNorm(config.attention_head_dim, eps=1e-6) if qk_norm else None
            self.norm_added_k = nn.RMSNorm(config.attention_head_dim, eps=1e-6) if qk_norm else None
        self.to_add_out = nn.Linear(dim, dim) if text_out else None

    def _heads(self, x: Tensor, rms: nn.Module | None) -> Tensor:
        x = x.unflatten(-1, (self.heads, -1))
        return x if rms is None else rms(x).to(x.dtype)  # autocast on a GPU computes the norm in fp32

    def image_qkv(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`[rows, tokens, dim]` to queries, keys and values `[rows, tokens, heads, head_dim]`."""
        return self._heads(self.to_q(image), self.norm_q), self._heads(self.to_k(image), self.norm_k), self._heads(self.to_v(image), None)

    def text_qkv(self, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the text stream."""
        q, k, v = self.add_q_proj(text), self.add_k_proj(text), self.add_v_proj(text)
        return self._heads(q, self.norm_added_q), self._heads(k, self.norm_added_k), self._heads(v, None)


QKV = tuple[Tensor, Tensor, Tensor]


class JointBlock(Block):
    """One MMDiT block. `last` has no text output; `dual` adds SD3.5's second image attention."""

    regions = ("before", "after")

    def __init__(self, config: SD3Config, last: bool, dual: bool) -> None:
        super().__init__()
        dim = config.inner_dim
        self.last, self.dual = last, dual
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = Attention(config, joint=True, text_out=not last)
        self.attn2 = Attention(config, joint=False, text_out=False) if dual else None
        self.ff = FeedForward(dim, 4 * dim)
        self.ff_context = None if last else FeedForward(dim, 4 * dim)

    def before(
        self, image: Tensor, text: Tensor, temb: Tensor, image_owner: Tensor | None, text_owner: Tensor | None
    ) -> tuple[QKV, QKV, QKV | None, Tensor, Tensor]:
        """Everything up to the attentions: their inputs (image, text, second image), and the modulation vectors of each request."""
        image_mod, text_mod = self.norm1(temb), self.norm1_context(temb)
        shift, scale, *_ = parts = self.norm1.parts(image_mod)
        # the last block's text norm (diffusers' AdaLayerNormContinuous) puts the scale first
        text_shift, text_scale = self.norm1_context.parts(text_mod)[:2][:: -1 if self.last else 1]
        normed = norm(image)
        second = None if self.attn2 is None else self.attn2.image_qkv(modulate(normed, parts[6], parts[7], image_owner))
        image_qkv = self.attn.image_qkv(modulate(normed, shift, scale, image_owner))
        text_qkv = self.attn.text_qkv(modulate(norm(text), text_shift, text_scale, text_owner))
        return image_qkv, text_qkv, second, image_mod, text_mod

    def after(
        self,
        streams: tuple[Tensor, Tensor],
        attended: tuple[Tensor, Tensor, Tensor | None],
        modulation: tuple[Tensor, Tensor],
        image_owner: Tensor | None,
        text_owner: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Everything behind the attentions, from their outputs (image, text, second image): the new streams."""
        (image, text), (image_attn, text_attn, second), (image_mod, text_mod) = streams, attended, modulation
        _, _, gate, shift, scale, gate_ff, *others = self.norm1.parts(image_mod)
        image = image + spread(gate, image_owner) * self.attn.to_out[0](image_attn)
        if self.attn2 is not None and second is not None:
            image = image + spread(others[2], image_owner) * self.attn2.to_out[0](second)
        image = image + spread(gate_ff, image_owner) * self.ff(modulate(norm(image), shift, scale, image_owner))

        if self.ff_context is not None and self.attn.to_add_out is not None:
            _, _, gate, shift, scale, gate_ff = self.norm1_context.parts(text_mod)
            text = text + spread(gate, text_owner) * self.attn.to_add_out(text_attn)
            text = text + spread(gate_ff, text_owner) * self.ff_context(modulate(norm(text), shift, scale, text_owner))
        return image, text

    def _attend(self, image: QKV, text: QKV, second: QKV | None, layout: Layout, provider: str) -> tuple[Tensor, Tensor, Tensor | None]:
        q, k, v = (layout.join(a, b) for a, b in zip(image, text, strict=True))
        image_out, text_out = layout.split(varlen_attention(q, k, v, layout.joint, provider).flatten(-2))
        if second is None:
            return image_out, text_out, None
        q, k, v = (layout.image.flat(a) for a in second)
        return image_out, text_out, layout.image.unflat(varlen_attention(q, k, v, layout.own, provider).flatten(-2))

    def forward(self, image: Tensor, text: Tensor, temb: Tensor, layout: Layout, provider: str) -> tuple[Tensor, Tensor]:
        owners = layout.image.owner(image.device), layout.text.owner(text.device)
        image_qkv, text_qkv, second, image_mod, text_mod = self.before(image, text, temb, *owners)
        attended = self._attend(image_qkv, text_qkv, second, layout, provider)
        del image_qkv, text_qkv, second  # the feed-forward is where memory peaks
        return self.after((image, text), attended, (image_mod, text_mod), *owners)


class SD3Transformer(PackedModel):
    """Velocity network of SD3 / SD3.5.

    Args:
        config: architecture.
        provider: attention provider.
    """

    block_list = "transformer_blocks"

    def __init__(self, config: SD3Config, provider: str = "sdpa") -> None:
        super().__init__()
        self._config, self.provider = config, provider
        self.patch = (config.patch_size, config.patch_size)
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.inner_dim)
        last = config.num_layers - 1
        self.transformer_blocks = nn.ModuleList(JointBlock(config, last=i == last, dual=i in config.dual_attention_layers) for i in range(config.num_layers))
        self.norm_out = Modulation(config.inner_dim, 2)
        self.proj_out = nn.Linear(config.inner_dim, config.patch_size**2 * self.out_channels)

    @property
    def config(self) -> SD3Config:
        return self._config

    def init_weights(self, generator: torch.Generator) -> None:
        """DiT initialisation (arXiv 2212.09748): Xavier-uniform linears, zero modulation and output layers."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1), generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear.weight)
        nn.init.zeros_(self.proj_out.weight)

    @property
    def longest_edge(self) -> tuple[int, str]:
        return self.config.pos_embed_max_size, "pos_embed_max_size"

    def packed_tokens(self, shape: Sequence[int], prompt_tokens: int) -> int:
        """Image and text tokens: both go through every layer."""
        return self.tokens(shape) + prompt_tokens

    def activation_bytes(self, itemsize: int) -> int:
        """See `PackedModel.activation_bytes`; the peak is the feed-forward of a block, on either stream."""
        return feed_forward_bytes(self.config.inner_dim, 4 * self.config.inner_dim, itemsize)

    def forward_flops(self, shape: Sequence[int], prompt_tokens: int) -> int:
        return cost.forward_flops(self.config, shape, prompt_tokens)

    def saved(self, shape: Sequence[int], prompt_tokens: int, itemsize: int, adapted: bool) -> Saved:
        return cost.saved(self.config, shape, prompt_tokens, itemsize, adapted)

    def forward(self, latents: Tensor | list[Tensor], t: Tensor, prompt_embeds: Tensor | list[Tensor], pooled: Tensor) -> Tensor | list[Tensor]:
        """Velocities of a batch of requests (see `PackedModel.forward`); `pooled` is `[B, pooled_projection_dim]`."""
        layout = self._layout(latents, prompt_embeds)
        image = layout.image.pack(self.pos_embed(latents) if isinstance(latents, Tensor) else by_shape(latents, self.pos_embed))
        text = self.context_embedder(layout.text.pack(prompt_embeds))
        temb = self._per_request(self.time_text_embed(t, pooled))
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, layout, self.provider)
        scale, shift = self.norm_out.parts(self.norm_out(temb))
        out = self.proj_out(modulate(norm(image), shift, scale, layout.image.owner(image.device)))
        return self._unpack(out, latents, layout.image)
