"""What a pass of the Cosmos network takes: operations, and what training keeps for the backward pass. Pure arithmetic on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from diffusion.families.base import Saved
from diffusion.families.cosmos.config import CosmosConfig


def forward_flops(c: CosmosConfig, shape: Sequence[int], text: int) -> int:
    """See `PackedModel.forward_flops`."""
    dim, patch, low = c.inner_dim, prod(c.patch_size), c.adaln_lora_dim
    video = prod(shape[1:]) // patch
    square = 2 * dim * dim
    ends = 2 * dim * video * patch * (c.patch_channels + c.out_channels)
    if c.use_crossattn_projection:
        ends += 2 * text * c.crossattn_proj_in_channels * c.encoder_hidden_states_channels
    per_request = square + 3 * square + 2 * dim * low * (1 + 2)
    modulation = 3 * 2 * dim * low * (1 + 3)
    layer = (
        square * video * (4 + 2)
        + 2 * text * c.text_embed_dim * dim * 2
        + 4 * video**2 * dim
        + 4 * video * text * dim
        + 4 * video * dim * c.ffn_dim
        + modulation
    )
    return ends + per_request + c.num_layers * layer


def saved(c: CosmosConfig, shape: Sequence[int], text: int, size: int, adapted: bool) -> Saved:
    """See `PackedModel.saved`.

    Bytes a token and channel of one block, with values of `size` (e) inside the network. Layer norms are fp32.

        both      fp32 inputs of the three layer norms; inputs of the norms of queries and keys (3 of the video, 1 of the text); q, k, v and
                  output of both attentions, of cross-attention but keys and values; two inputs of projections; the feed-forward before its
                  activation
        full      fp32: the three modulated norms; e: three outputs before their gates, the feed-forward's input and what is behind its
                  activation, two inputs of projections more
        adapted   frozen layers keep nothing of their input, adapters on q, k, v and out do
    """
    dim, e, full = c.inner_dim, size, not adapted
    video = prod(shape[1:]) // prod(c.patch_size)
    per_token = 3 * 4 + 3 * e + 6 * e + 2 * e + full * (3 * 4 + 3 * e + 2 * e + 2 * e)
    feed_forward = c.ffn_dim * e * (1 + full)
    words = 3 * e * dim + c.text_embed_dim * e * (1 + full)
    block = video * (dim * per_token + feed_forward + 8 * c.num_attention_heads) + text * words + 12 * dim * 4
    head = video * dim * (4 + 4 + e) * full + text * (c.prompt_channels * e * full + c.text_embed_dim * e * 2)
    gradients = video * (2 * c.ffn_dim * e + 2 * dim * 4)
    weights = (6 + 2 * full) * dim * dim + 2 * dim * c.ffn_dim
    return Saved((block,) * c.num_layers, (video * dim * e,) * c.num_layers, head, gradients, (weights,) * c.num_layers)
