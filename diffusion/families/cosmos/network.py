"""Cosmos transformer (Predict2.5, and earlier ones) on packed sequences, with diffusers' config keys and parameter names.

A state dict of `diffusers.CosmosTransformer3DModel` loads here unchanged and back. Clips of any mix of frame counts and sizes share one
forward (`diffusion.packing`). Conditioning:

    prompt_embeds [L, D]       text features, before or behind the network's projection of them
    given [C, k, h, w]         clean latent frames in front of the sampled ones: none for text-to-video, the image's, or those of a clip
    fps []                     frames a second, where frames' positions follow them; absent: a position a frame, as the pipeline has it

Time is that of rectified flow in [0, 1], not 1000 t. Sources: diffusers 0.42.1, `transformer_cosmos.py` and `pipeline_cosmos2_5_predict.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.families.base import PackedModel, Saved, by_shape, feed_forward_bytes
from diffusion.families.cosmos import cost
from diffusion.families.cosmos.blocks import CosmosBlock, Modulation, modulated
from diffusion.families.cosmos.config import EPS, CosmosConfig
from diffusion.families.given import Batch, free_part, given_times, joined
from diffusion.families.layers import time_features
from diffusion.families.rotary import THETA, Rotary
from diffusion.packing import Stream

BASE_FPS = 24
"""Frames a second at which a frame is a position."""
GIVEN_TIME = 1e-4
"""Time of given frames, default of the pipeline, right for the post-trained 2B; others were trained with the time of the free ones."""


class TimeEmbedder(nn.Module):
    """Features of the time to the vectors that all sublayers share."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 3 * dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(features)))
        return out


class TimeEmbedding(nn.Module):
    """Time for the blocks: the norm of its features, and the vectors that all sublayers share."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.t_embedder = TimeEmbedder(dim)
        self.norm = nn.RMSNorm(dim, eps=EPS)

    def forward(self, t: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`t` `[R]` to `[R, dim]` and `[R, 3 dim]`; features in `dtype`, as sampler and learner must share it."""
        features = time_features(t, self.dim, 1.0).to(dtype)
        return self.norm(features), self.t_embedder(features)


class Patches(nn.Module):
    """Patches to tokens: `[C, h, w]` of a patch flattened in that order."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        self.patch = config.patch_size
        self.proj = nn.Linear(config.patch_channels * prod(config.patch_size), config.inner_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, C, f, h, w]` to `[B, tokens, dim]`."""
        p, q, r = self.patch
        cut = x.unflatten(4, (-1, r)).unflatten(3, (-1, q)).unflatten(2, (-1, p))  # B C f p h q w r
        out: Tensor = self.proj(cut.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3))
        return out


class LearnablePositions(nn.Module):
    """Learnt vectors of a token's frame, row and column, of which the sum is brought to a root mean square of 1 (Cosmos 1.0)."""

    def __init__(self, config: CosmosConfig) -> None:
        super().__init__()
        frames, rows, columns = (n // p for n, p in zip(config.max_size, config.patch_size, strict=True))
        self.pos_emb_t, self.pos_emb_h, self.pos_emb_w = (nn.Parameter(torch.zeros(n, config.inner_dim)) for n in (frames, rows, columns))

    def init_weights(self, generator: torch.Generator) -> None:
        """Normal, not diffusers' zeros, of which there is no direction to learn; as large as what is made of it, or a small step turned it far."""
        for table in self.parameters():
            nn.init.normal_(table, std=1.0, generator=generator)

    def forward(self, grid: tuple[int, int, int]) -> Tensor:
        """Of a grid's tokens, `[tokens, dim]`, fp32. Raises ValueError for one that is larger than the tables."""
        tables = self.pos_emb_t, self.pos_emb_h, self.pos_emb_w
        if any(n > len(table) for table, n in zip(tables, grid, strict=True)):
            raise ValueError(f"{grid} patches are more than the network has learnt positions of, {tuple(len(table) for table in tables)}")
        t, h, w = (table[:n].float() for table, n in zip(tables, grid, strict=True))
        total = (t[:, None, None] + h[:, None] + w).flatten(0, 2)
        return total / (EPS + torch.linalg.vector_norm(total, dim=-1, keepdim=True) * total.shape[-1] ** -0.5)


class CosmosTransformer(PackedModel):
    """Velocity network of Cosmos-Predict2.5.

    Args:
        config: architecture.
        provider: attention provider.
        given_time: time of given frames; None = that of the free ones.
    """

    block_list = "transformer_blocks"

    def __init__(self, config: CosmosConfig, provider: str = "sdpa", given_time: float | None = GIVEN_TIME) -> None:
        super().__init__()
        self._config, self.provider, self.given_time = config, provider, given_time
        self.patch = config.patch_size
        self.out_channels = config.out_channels
        dim, head = config.inner_dim, config.attention_head_dim
        side = 2 * (head // 6)
        axes = zip(config.rope_scale, (head - 2 * side, side, side), strict=True)
        frames, rows, columns = (THETA * scale ** (d / (d - 2)) for scale, d in axes)
        self.rotary = Rotary(head, self.longest_edge[0], (frames, rows, columns))
        self.patch_embed = Patches(config)
        self.learnable_pos_embed = LearnablePositions(config) if config.extra_pos_embed_type else None
        self.time_embed = TimeEmbedding(dim)
        self.add_module("transformer_blocks", nn.ModuleList(CosmosBlock(config) for _ in range(config.num_layers)))
        self.norm_out = Modulation(config, 2)
        self.proj_out = nn.Linear(dim, self.out_channels * prod(config.patch_size), bias=False)
        if config.use_crossattn_projection:
            self.crossattn_proj = nn.Sequential(nn.Linear(config.crossattn_proj_in_channels, config.encoder_hidden_states_channels), nn.GELU())

    @property
    def config(self) -> CosmosConfig:
        return self._config

    @property
    def latent_channels(self) -> int:
        return self.config.out_channels

    @property
    def longest_edge(self) -> tuple[int, str]:
        return max(n // p for n, p in zip(self.config.max_size, self.config.patch_size, strict=True)), "max_size"

    def init_weights(self, generator: torch.Generator) -> None:
        """Xavier-uniform linears, zero output layer and modulation."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight, generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Modulation):
                nn.init.zeros_(module.linear_2.weight)
        if self.learnable_pos_embed is not None:
            self.learnable_pos_embed.init_weights(generator)
        nn.init.zeros_(self.proj_out.weight)

    def packed_tokens(self, shape: Sequence[int], prompt_tokens: int) -> int:
        """Video tokens: text goes through two projections a layer only."""
        return self.tokens(shape)

    def activation_bytes(self, itemsize: int) -> int:
        """See `PackedModel.activation_bytes`; the peak is the feed-forward of a block."""
        return feed_forward_bytes(self.config.inner_dim, self.config.ffn_dim, itemsize)

    def forward_flops(self, shape: Sequence[int], prompt_tokens: int) -> int:
        return cost.forward_flops(self.config, shape, prompt_tokens)

    def saved(self, shape: Sequence[int], prompt_tokens: int, itemsize: int, adapted: bool) -> Saved:
        return cost.saved(self.config, shape, prompt_tokens, itemsize, adapted)

    def project(self, prompt_embeds: Tensor) -> Tensor:
        """Text features `[…, D]` at the width of the cross-attention's keys. Those that have it are projected already, as an encoder does
        while the projection is frozen. Raises ValueError for another width."""
        c = self.config
        if prompt_embeds.shape[-1] == c.text_embed_dim:
            return prompt_embeds
        if prompt_embeds.shape[-1] != c.prompt_channels:
            raise ValueError(f"text features of {prompt_embeds.shape[-1]} channels fit neither text_embed_dim={c.text_embed_dim} nor {c.prompt_channels}")
        projected: Tensor = self.crossattn_proj(prompt_embeds)
        return projected

    def _positions(self, latents: Batch, stream: Stream, fps: Tensor | None) -> Tensor:
        """Rotary positions of a stream `[1, tokens, 2, head_dim / 2]`; each grid's are computed once."""
        stretches = [1.0] * len(latents) if fps is None else [BASE_FPS / float(f) for f in fps]
        keys = [(self.grid(x.shape), stretch) for x, stretch in zip(latents, stretches, strict=True)]
        tables = {key: self.rotary(key[0], latents[0].device, key[1]) for key in set(keys)}
        if stream.even and len(tables) == 1:
            return stream.ranks.cut(tables[keys[0]][None])
        return stream.pack([tables[key].flatten(1) for key in keys]).unflatten(-1, (2, -1))

    def _learnt(self, latents: Batch, stream: Stream, dtype: torch.dtype) -> Tensor | None:
        """Learnt positions of a stream `[rows, tokens, dim]`, None where the network has none; each grid's are computed once."""
        if self.learnable_pos_embed is None:
            return None
        grids = [self.grid(x.shape) for x in latents]
        tables = {grid: self.learnable_pos_embed(grid).to(dtype) for grid in set(grids)}
        if stream.even and len(tables) == 1:
            return stream.ranks.cut(tables[grids[0]][None])
        return stream.pack([tables[grid] for grid in grids])

    def _marked(self, whole: Batch, given: Batch | None) -> Batch:
        """The network's input: latents, 1 on given frames, and a padding mask of zeros."""
        frames = [0] * len(whole) if given is None else [g.shape[1] for g in given]
        extra = 1 + self.config.concat_padding_mask
        masks = [x.new_zeros(extra, *x.shape[1:]) for x in whole]
        for mask, k in zip(masks, frames, strict=True):
            mask[0, :k] = 1
        return joined([whole, torch.stack(masks) if isinstance(whole, Tensor) else masks], 0)

    def forward(self, latents: Batch, t: Tensor, prompt_embeds: Batch, given: Batch | None = None, fps: Tensor | None = None) -> Batch:
        """Velocities of a batch of clips (see `PackedModel.forward`); latents are `[C, f, h, w]` each, conditioning as the module says."""
        whole = latents if given is None else joined([given, latents], 1)
        layout = self._layout(whole, prompt_embeds)
        inputs = self._marked(whole, given)
        x = layout.image.pack(self.patch_embed(inputs) if isinstance(inputs, Tensor) else by_shape(inputs, self.patch_embed)).contiguous()
        positions, learnt = self._positions(whole, layout.image, fps), self._learnt(whole, layout.image, x.dtype)
        text = self.project(layout.text.pack(prompt_embeds))
        first = (0,) * len(latents) if given is None else tuple(g[0].numel() // prod(self.patch) for g in given)
        apart = self.given_time is not None and any(first)
        owner = layout.image.parts(first, x.device) if apart else layout.image.owner(x.device)
        times = given_times(t, self.given_time) if apart and self.given_time is not None else t
        embedded, shared = (self._per_request(values) for values in self.time_embed(times, x.dtype))
        for block in self.blocks:
            x = block(x if learnt is None else x + learnt, text, embedded, shared, positions, owner, layout, self.provider)
        shift, scale = self.norm_out(embedded, shared)
        velocities = self._unpack(self.proj_out(modulated(x, shift, scale, owner)), whole, layout.image)
        return velocities if given is None else free_part(velocities, given)
