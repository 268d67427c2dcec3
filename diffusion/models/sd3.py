"""SD3 / SD3.5 MMDiT on packed sequences (arXiv 2403.03206), with diffusers' config keys and parameter names.

A state dict of `diffusers.SD3Transformer2DModel` loads here unchanged and back. Requests of any mix of sizes, prompt
lengths and times share one forward: image tokens and text tokens are two streams (`diffusion.packing`), joint attention
runs over `[image_i, text_i]` segments, modulation is per request.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.attention import varlen_attention
from diffusion.packing import JointLayout, Stream


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
        known = {f.name for f in fields(cls)}
        extra = {k for k in values if k not in known and not k.startswith("_")}
        if extra:
            raise ValueError(f"SD3 config has keys this model does not know: {', '.join(sorted(extra))}")
        kept: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if k in known}
        config = cls(**kept)
        if config.qk_norm not in (None, "rms_norm"):
            raise ValueError(f"qk_norm={config.qk_norm!r} is not known; SD3 uses none, SD3.5 'rms_norm'")
        if config.caption_projection_dim != config.inner_dim:
            raise ValueError(f"caption_projection_dim={config.caption_projection_dim} must equal heads x head_dim = {config.inner_dim}")
        return config

    def to_dict(self) -> dict[str, Any]:
        return {f.name: list(v) if isinstance(v := getattr(self, f.name), tuple) else v for f in fields(self)}


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
        if rows > self.grid or columns > self.grid:
            raise ValueError(f"{rows}x{columns} patches exceed pos_embed_max_size={self.grid}; sample a smaller size")
        top, left = (self.grid - rows) // 2, (self.grid - columns) // 2
        table = self.pos_embed.reshape(self.grid, self.grid, -1)[top : top + rows, left : left + columns]
        return table.reshape(rows * columns, -1)

    def forward(self, latents: Tensor) -> Tensor:
        """`[B, C, H, W]` to `[B, H W / patch², dim]`."""
        tokens = self.proj(latents)
        rows, columns = tokens.shape[-2:]
        return tokens.flatten(2).transpose(1, 2) + self.crop(rows, columns)


class TwoLayer(nn.Module):
    """linear_1, SiLU, linear_2: diffusers' TimestepEmbedding and PixArtAlphaTextProjection."""

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(x)))
        return out


class TimeTextEmbed(nn.Module):
    """Conditioning vector: sinusoidal time (256 channels, cosine first) and the pooled text, each through two layers."""

    def __init__(self, config: SD3Config) -> None:
        super().__init__()
        self.timestep_embedder = TwoLayer(256, config.inner_dim)
        self.text_embedder = TwoLayer(config.pooled_projection_dim, config.inner_dim)

    def forward(self, t: Tensor, pooled: Tensor) -> Tensor:
        """`t` `[B]` in [0, 1] (the network sees 1000 t), `pooled` `[B, P]` to `[B, dim]`."""
        frequency = torch.exp(-math.log(10000) * torch.arange(128, device=t.device, dtype=torch.float32) / 128)
        angle = 1000 * t.float()[:, None] * frequency
        time = torch.cat([angle.cos(), angle.sin()], 1).to(pooled.dtype)
        out: Tensor = self.timestep_embedder(time) + self.text_embedder(pooled)
        return out


class Modulation(nn.Module):
    """SiLU then one linear to `count` vectors; and the layer norm that they shift and scale (adaLN)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__()
        self.count = count
        self.linear = nn.Linear(dim, count * dim)
        self.dim = dim

    def forward(self, temb: Tensor, stream: Stream) -> tuple[Tensor, ...]:
        return tuple(stream.per_token(part) for part in self.linear(F.silu(temb)).chunk(self.count, 1))


def norm(x: Tensor) -> Tensor:
    """Layer norm without parameters, eps 1e-6."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class FeedForward(nn.Module):
    """GELU (tanh) MLP of width 4; parameter names net.0.proj and net.2."""

    class _Proj(nn.Module):
        def __init__(self, dim: int) -> None:
            super().__init__()
            self.proj = nn.Linear(dim, 4 * dim)

        def forward(self, x: Tensor) -> Tensor:
            return F.gelu(self.proj(x), approximate="tanh")

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.net = nn.Sequential(self._Proj(dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


class Attention(nn.Module):
    """Projections of one attention; `joint` adds the text stream's own, `text_out` its output projection."""

    def __init__(self, config: SD3Config, joint: bool, text_out: bool) -> None:
        super().__init__()
        dim = config.inner_dim
        self.heads, self.joint = config.num_attention_heads, joint
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

    def forward(self, image: Tensor, stream: Stream, provider: str) -> Tensor:
        """Self-attention of the image stream alone (SD3.5's second attention)."""
        q = self._heads(self.to_q(image), self.norm_q)
        k = self._heads(self.to_k(image), self.norm_k)
        v = self._heads(self.to_v(image), None)
        flat_q, flat_k, flat_v = (a.reshape(1, stream.total, *a.shape[2:]) for a in (q, k, v))
        out = varlen_attention(flat_q, flat_k, flat_v, list(stream.lens), provider).flatten(-2)
        result: Tensor = self.to_out[0](out.reshape(image.shape))
        return result

    def forward_joint(self, image: Tensor, text: Tensor, layout: JointLayout, provider: str) -> tuple[Tensor, Tensor | None]:
        """Joint attention over `[image_i, text_i]`; the text output is None in the last block."""
        q = layout.join(self._heads(self.to_q(image), self.norm_q), self._heads(self.add_q_proj(text), self.norm_added_q))
        k = layout.join(self._heads(self.to_k(image), self.norm_k), self._heads(self.add_k_proj(text), self.norm_added_k))
        v = layout.join(self._heads(self.to_v(image), None), self._heads(self.add_v_proj(text), None))
        image_out, text_out = layout.split(varlen_attention(q, k, v, layout.lens, provider).flatten(-2))
        return self.to_out[0](image_out), None if self.to_add_out is None else self.to_add_out(text_out)


class JointBlock(nn.Module):
    """One MMDiT block. `last` has no text output; `dual` adds SD3.5's second image attention."""

    def __init__(self, config: SD3Config, last: bool, dual: bool) -> None:
        super().__init__()
        dim = config.inner_dim
        self.last, self.dual = last, dual
        self.norm1 = Modulation(dim, 9 if dual else 6)
        self.norm1_context = Modulation(dim, 2 if last else 6)
        self.attn = Attention(config, joint=True, text_out=not last)
        self.attn2 = Attention(config, joint=False, text_out=False) if dual else None
        self.ff = FeedForward(dim)
        self.ff_context = None if last else FeedForward(dim)

    def forward(self, image: Tensor, text: Tensor, temb: Tensor, layout: JointLayout, provider: str) -> tuple[Tensor, Tensor]:
        mod = self.norm1(temb, layout.image)
        shift, scale, gate, shift_ff, scale_ff, gate_ff = mod[:6]
        normed = norm(image)
        image_in = normed * (1 + scale) + shift
        text_mod = self.norm1_context(temb, layout.text)
        # the last block's text norm (diffusers' AdaLayerNormContinuous) puts the scale first
        text_scale_in, text_shift_in = text_mod[:2] if self.last else (text_mod[1], text_mod[0])
        text_in = norm(text) * (1 + text_scale_in) + text_shift_in

        image_attn, text_attn = self.attn.forward_joint(image_in, text_in, layout, provider)
        image = image + gate * image_attn
        if self.attn2 is not None:
            shift2, scale2, gate2 = mod[6:]
            image = image + gate2 * self.attn2(normed * (1 + scale2) + shift2, layout.image, provider)
        image = image + gate_ff * self.ff(norm(image) * (1 + scale_ff) + shift_ff)

        if self.ff_context is not None and text_attn is not None:
            _, _, text_gate, text_shift, text_scale, text_gate_ff = text_mod
            text = text + text_gate * text_attn
            text = text + text_gate_ff * self.ff_context(norm(text) * (1 + text_scale) + text_shift)
        return image, text


class SD3Transformer(nn.Module):
    """Velocity network of SD3 / SD3.5.

    Args:
        config: architecture.
        provider: attention provider (see `diffusion.attention`); an attribute, changeable at any time.
    """

    def __init__(self, config: SD3Config, provider: str = "sdpa") -> None:
        super().__init__()
        self.config, self.provider = config, provider
        self.out_channels = config.in_channels if config.out_channels is None else config.out_channels
        self.pos_embed = PatchEmbed(config)
        self.time_text_embed = TimeTextEmbed(config)
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.inner_dim)
        last = config.num_layers - 1
        self.transformer_blocks = nn.ModuleList(JointBlock(config, last=i == last, dual=i in config.dual_attention_layers) for i in range(config.num_layers))
        self.norm_out = Modulation(config.inner_dim, 2)
        self.proj_out = nn.Linear(config.inner_dim, config.patch_size**2 * self.out_channels)

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

    def tokens(self, height: int, width: int) -> int:
        """Image tokens of one request of this latent size. Raises ValueError when the size does not fit the patches."""
        patch = self.config.patch_size
        if height % patch or width % patch:
            raise ValueError(f"latent size {height}x{width} is not a multiple of the patch size {patch}")
        return (height // patch) * (width // patch)

    def _unpatchify(self, tokens: Tensor, height: int, width: int) -> Tensor:
        patch = self.config.patch_size
        grid = tokens.unflatten(1, (height // patch, width // patch)).unflatten(-1, (patch, patch, self.out_channels))
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.out_channels, height, width)

    def forward(self, latents: Tensor | list[Tensor], t: Tensor, prompt_embeds: Tensor | list[Tensor], pooled: Tensor) -> Tensor | list[Tensor]:
        """Velocities of a batch of requests.

        Args:
            latents: `[B, C, H, W]`, or a list of `[C, H_i, W_i]` for mixed sizes.
            t: times `[B]` in [0, 1].
            prompt_embeds: `[B, L, joint_attention_dim]`, or a list of `[L_i, …]`.
            pooled: `[B, pooled_projection_dim]`.
        Returns:
            Velocities, shaped as `latents`.
        """
        if isinstance(latents, Tensor):
            shapes = [tuple(latents.shape[-2:])] * len(latents)
            images: Tensor | list[Tensor] = self.pos_embed(latents)
        else:
            shapes = [tuple(x.shape[-2:]) for x in latents]
            images = [self.pos_embed(x[None])[0] for x in latents]
        image_stream = Stream(tuple(self.tokens(h, w) for h, w in shapes))
        text_stream = Stream(tuple(len(e) for e in prompt_embeds))
        layout = JointLayout(image_stream, text_stream)

        image = image_stream.pack(images)
        text = self.context_embedder(text_stream.pack(prompt_embeds))
        temb = self.time_text_embed(t, pooled)
        for block in self.transformer_blocks:
            image, text = block(image, text, temb, layout, self.provider)
        scale, shift = self.norm_out(temb, image_stream)
        out = self.proj_out(norm(image) * (1 + scale) + shift)

        if isinstance(latents, Tensor):
            return self._unpatchify(out, *shapes[0])
        return [self._unpatchify(o[None], *s)[0] for o, s in zip(image_stream.unpack(out), shapes, strict=True)]
