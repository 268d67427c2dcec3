"""What a pass of the Wan network takes: operations, and what training keeps for the backward pass. Pure arithmetic on the architecture."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING

from diffusion.families.base import Saved

if TYPE_CHECKING:
    from diffusion.families.wan.config import WanConfig


def forward_flops(c: WanConfig, shape: Sequence[int], text: int) -> int:
    """See `PackedModel.forward_flops`."""
    dim, patch = c.inner_dim, prod(c.patch_size)
    video, image = prod(shape[1:]) // patch, c.image_tokens
    square = 2 * dim * dim
    ends = 2 * dim * video * patch * (c.in_channels + c.latent_channels) + 2 * dim * text * c.text_dim + square * text
    ends += 2 * image * (c.image_dim or 0) * ((c.image_dim or 0) + dim)
    per_request = 2 * dim * c.freq_dim + square + 6 * square
    layer = square * video * (4 + 2) + square * (text + image) * 2 + 4 * video**2 * dim + 4 * video * (text + image) * dim + 4 * video * dim * c.ffn_dim
    return ends + per_request + c.num_layers * layer


def saved(c: WanConfig, shape: Sequence[int], text: int, size: int, adapted: bool) -> Saved:
    """See `PackedModel.saved`.

    Bytes a token and channel of one block, with values of `size` (e) inside the network. What is computed in fp32 (norms, modulation,
    rotary positions, gated sums) keeps its fp32 input: where e is smaller, that is a copy.

        both      fp32 inputs of the three layer norms and, of queries and keys, of their norms (3 of the video, 1 of the text); q, k, v and
                  output of both attentions; input of their projections; the feed-forward before its activation
        full      fp32: the two modulated norms' outputs, the two gated outputs (the residual's copy is shared), norms behind their
                  division; the feed-forward's input and what is behind its activation; the input of cross-attention's queries
        adapted   frozen layers keep nothing of their input, adapters on q, k, v and out do
    """
    dim, e, full = c.inner_dim, size, not adapted
    video = prod(shape[1:]) // prod(c.patch_size)
    image = c.image_tokens  # their keys and values are kept as the text's are; of the video, an output of attention of their own, and the sum
    # video: 3 layer norms, 3 query and key norms; q, k, v, out of self-attention, q and out of cross-attention; two inputs of projections
    per_token = 6 * 4 + 6 * e + 2 * e + full * (2 * 4 + 3 * 4 + 4 + e)
    feed_forward = c.ffn_dim * e * (1 + full)
    words = 4 + 2 * e + 4 * full
    # 4 sums of the softmax a head, and the modulation's vectors of a request
    if image:
        per_token += 2 * e
    block = video * (dim * per_token + feed_forward + 8 * c.num_attention_heads) + (text + image) * dim * words + 12 * dim * 4
    head = video * dim * (4 + (4 + e) * full) + text * (c.text_dim * e * full + dim * e * 2)
    head += image * ((c.image_dim or 0) * (4 + 2 * e) * full + dim * (e + 4 * full))
    gradients = video * (2 * c.ffn_dim * e + 2 * dim * 4)
    weights = (6 + 2 * full) * dim * dim + 2 * dim * c.ffn_dim  # an adapter's gradient does not reach the text
    return Saved((block,) * c.num_layers, (video * dim * e,) * c.num_layers, head, gradients, (weights,) * c.num_layers)
