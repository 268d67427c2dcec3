"""Wan 2.1 and 2.2 transformers on packed sequences (arXiv 2503.20314), with diffusers' config keys and parameter names.

A state dict of `diffusers.WanTransformer3DModel` loads here unchanged and back. Clips of any mix of frame counts and
sizes share one forward: video tokens form one stream (`diffusion.packing`), rotary positions follow each clip's own
grid, modulation is per request, and each clip attends to itself and to its own text.

    text-to-video         prompt_embeds [L, D]
    image-to-video 2.1    also condition [4 + C, f, h, w], channels of the input beside the C that are sampled: mask and encoded image;
                          and image_embeds [257, image_dim], CLIP's features of the image (of first and last: [514, image_dim])
    image-to-video A14B   condition alone
    TI2V-5B               given [C, k, h, w], clean frames in front of the sampled ones, at time 0 (`given_time`)
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion.families.base import PackedModel, Saved, by_shape, feed_forward_bytes
from diffusion.families.given import Batch, free_part, given_times, joined
from diffusion.families.layers import FeedForward, TwoLayer, norm, time_features
from diffusion.families.rotary import Rotary
from diffusion.families.wan import cost
from diffusion.families.wan.blocks import Features, LayerNorm32, WanBlock
from diffusion.families.wan.config import WanConfig
from diffusion.packing import Stream, spread


class ImageEmbedder(nn.Module):
    """An image's features at the network's width."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        assert config.image_dim is not None
        self.norm1, self.norm2 = LayerNorm32(config.image_dim), LayerNorm32(config.inner_dim)
        self.ff = FeedForward(config.image_dim, config.image_dim, config.inner_dim, approximate="none")
        self.pos_embed = nn.Parameter(torch.zeros(1, config.pos_embed_seq_len, config.image_dim)) if config.pos_embed_seq_len is not None else None

    def forward(self, features: Tensor) -> Tensor:
        """`[B, n, image_dim]` to `[B, n, dim]`."""
        out: Tensor = self.norm2(self.ff(self.norm1(features if self.pos_embed is None else features + self.pos_embed)))
        return out


class ConditionEmbedder(nn.Module):
    """Time and text for the blocks: a vector of each request, its six modulation vectors, and the text stream."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__()
        dim = config.inner_dim
        self.channels = config.freq_dim
        self.time_embedder = TwoLayer(config.freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TwoLayer(config.text_dim, dim, gelu=True)
        self.image_embedder = ImageEmbedder(config) if config.image_dim is not None else None

    def forward(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """`t` `[B]` to `[B, dim]` and `[B, 6, dim]`."""
        temb = self.time_embedder(time_features(t, self.channels).to(self.time_embedder.linear_1.weight.dtype))
        return temb, self.time_proj(F.silu(temb)).unflatten(1, (6, -1))


class WanTransformer(PackedModel):
    """Velocity network of Wan 2.1 and 2.2.

    Args:
        config: architecture.
        provider: attention provider.
    """

    block_list = "blocks"
    unused = ("norm_added_q",)

    def __init__(self, config: WanConfig, provider: str = "sdpa") -> None:
        super().__init__()
        self._config, self.provider = config, provider
        self.patch = config.patch_size
        self.out_channels = config.latent_channels
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
    def needs_picture(self) -> bool:
        return self.config.condition_channels > 0

    @property
    def latent_channels(self) -> int:
        return self.config.latent_channels

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

    def _positions(self, latents: Batch, stream: Stream) -> Tensor:
        """Rotary positions of a stream `[1, tokens, 2, head_dim / 2]`; each grid's are computed once."""
        grids = [self.grid(x.shape) for x in latents]
        tables = {grid: self.rotary(grid, latents[0].device) for grid in set(grids)}
        if stream.even and len(tables) == 1:
            return stream.ranks.cut(tables[grids[0]][None])
        each = [tables[grid].flatten(1) for grid in grids]
        return stream.pack(each).unflatten(-1, (2, -1))

    def _features(self, image_embeds: Batch | None, latents: Batch) -> Features | None:
        embedder = self.condition_embedder.image_embedder
        if embedder is None or image_embeds is None:
            if (embedder is None) != (image_embeds is None):
                raise ValueError("image_embeds and a network with image_dim belong together")
            return None
        tokens = embedder(image_embeds if isinstance(image_embeds, Tensor) else torch.stack(image_embeds))
        layout = self._layout(latents, tokens)
        return Features(layout.text.pack(tokens), layout)

    def forward_flops(self, shape: Sequence[int], prompt_tokens: int) -> int:
        return cost.forward_flops(self.config, shape, prompt_tokens)

    def saved(self, shape: Sequence[int], prompt_tokens: int, itemsize: int, adapted: bool) -> Saved:
        return cost.saved(self.config, shape, prompt_tokens, itemsize, adapted)

    def forward(
        self,
        latents: Batch,
        t: Tensor,
        prompt_embeds: Batch,
        image_embeds: Batch | None = None,
        condition: Batch | None = None,
        given: Batch | None = None,
    ) -> Batch:
        """Velocities of a batch of clips (see `PackedModel.forward`); latents are `[C, f, h, w]` each, conditioning as the module says."""
        whole = latents if given is None else joined([given, latents], 1)
        if (condition is None) == self.needs_picture:
            raise ValueError(f"condition and a network with {self.config.condition_channels} channels for it beside the latents do not fit")
        layout = self._layout(whole, prompt_embeds)
        inputs = whole if condition is None else joined([whole, condition], 0)
        x = layout.image.pack(self._embed(inputs) if isinstance(inputs, Tensor) else by_shape(inputs, self._embed)).contiguous()
        positions, features = self._positions(whole, layout.image), self._features(image_embeds, whole)
        text = self.condition_embedder.text_embedder(layout.text.pack(prompt_embeds))
        first = (0,) * len(latents) if given is None else tuple(g[0].numel() // prod(self.patch) for g in given)
        apart = self.given_time is not None and any(first)
        owner = layout.image.parts(first, x.device) if apart else layout.image.owner(x.device)
        temb, vectors = self.condition_embedder(given_times(t, self.given_time) if apart and self.given_time is not None else t)
        temb, vectors = self._per_request(temb), self._per_request(vectors.flatten(1)).unflatten(1, (6, -1))
        for block in self.blocks:
            x = block(x, text, vectors, positions, owner, layout, self.provider, features)
        shift, scale = (self.scale_shift_table.float() + temb.float()[:, None]).unbind(1)
        out = (norm(x.float(), self.config.eps) * (1 + spread(scale, owner)) + spread(shift, owner)).to(x.dtype)
        velocities = self._unpack(self.proj_out(out), whole, layout.image)
        return velocities if given is None else free_part(velocities, given)
